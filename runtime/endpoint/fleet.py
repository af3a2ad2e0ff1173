"""The models that one gateway serves: on one loop, with a device's memory between them.

The first one starts with the container, the others when somebody asks them. Where a *pool* is
wanted, so many models are kept parked, their weights in memory, as far as there is room for them
that nobody else wants. What each model's policy would have of it while nobody asks is seen to by
`coldframe.runtime.scaling.foresight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from coldframe.loader.cgroup import memory_available
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.scaling.budget import Budget
from coldframe.runtime.scaling.foresight import Foresight
from coldframe.runtime.scaling.policy_state import PolicyState

__all__ = ["Fleet"]


class Fleet:
    """Models by the names that clients call them by.

    Args:
        models: Each one's supervisor; the first is meant where no name is given.
        loop: What they all use.
        room: What they share, where they share anything.
        pool: So many are kept parked.
        budget: For how long devices may be held while nobody asks, where that is limited.
        state: Where what the policies have learned is kept.
    """

    def __init__(
        self,
        models: Mapping[str, Supervisor],
        loop: Loop,
        room: Room | None = None,
        pool: int = 0,
        budget: Budget | None = None,
        state: PolicyState | None = None,
    ) -> None:
        self.loop = loop
        self._models = models
        self._room = room
        self._pool = pool
        self._foresight = Foresight(room, budget, memory_available)
        self.budget = budget
        self._state = state

    def __getitem__(self, name: str) -> Supervisor:
        return self._models[name]

    def __iter__(self) -> Iterator[tuple[str, Supervisor]]:
        return iter(self._models.items())

    @property
    def first(self) -> Supervisor:
        """The model that is meant where none is named."""
        return next(iter(self._models.values()))

    @property
    def at_zero(self) -> bool:
        """Whether one has gone back to zero, and nothing is held for any, and nobody asks one.

        Nor is one to be there again before somebody asks it.
        """
        models = self._models.values()
        been = any(model.starts and model.state == "zero" for model in models)
        left = all(model.state in ("zero", "failed") and model.idle for model in models)
        return been and left and not any(model.will_rise for model in models)

    @property
    def starting(self) -> bool:
        """Whether one of them is on its way."""
        return any(model.state == "starting" for model in self._models.values())

    @property
    def error(self) -> ColdframeError | None:
        """Why none of them can go on, where that is so: the first one's reason."""
        errors = [model.error for model in self._models.values()]
        return None if None in errors else errors[0]

    def poll(self, timeout: float) -> None:
        """Handles what has happened; waits for something at most so many seconds."""
        models = self._models.values()
        waits = (model.wait_s for model in models)
        self.loop.poll(min(timeout, self._foresight.wait_s, *waits))
        for model in models:
            model.tick()

    def step(self) -> None:
        """What there is to do after something has happened; to be called after each poll."""
        for model in self._models.values():
            model.step()
        while self._room is not None and self._room.changed:
            # Somebody has left: who waits for that goes on now, and not with the next event.
            self._room.changed = False
            for model in self._models.values():
                if model.state in ("starting", "parked"):
                    model.step()
        self._foresight.step(self)
        if self._state is not None:
            self._state.step((name, model.unasked) for name, model in self)
        if not self.starting:
            self._prepare()

    def drain(self) -> None:
        """Starts nothing any more that nobody has asked for."""
        self._pool = 0
        for model in self._models.values():
            model.ends = True

    def close(self) -> None:
        """Ends all processes; requests get no word of it."""
        if self._state is not None:
            self._state.save((name, model.unasked) for name, model in self)
        for model in self._models.values():
            model.close()
        if self._state is not None:
            self._state.close()

    def _prepare(self) -> None:
        """What is better done before somebody asks for it; one thing at a time."""
        models = self._models.values()
        for model in models:
            if not model.known and model.error is None:
                model.read_ahead()
        if self._pool:
            self._keep_pool()

    def _keep_pool(self) -> None:
        """Has as many models parked as there are to be."""
        models = self._models.values()
        parked = sorted((m for m in models if m.state == "parked"), key=lambda m: m.used_at)
        for model in parked[: max(0, len(parked) - self._pool)]:
            model.make_room()
        loaded = sum(model.state in ("warm", "draining", "parked") for model in models)
        if loaded >= self._pool or not all(model.idle for model in models):
            return
        for model in models:
            if model.may_start_ahead and self._foresight.may_begin(model):
                model.start_ahead()
                return
