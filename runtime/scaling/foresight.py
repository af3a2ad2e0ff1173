"""What is done for models that nobody asks: who may be held, and who is there ahead of requests.

Each model's policy says what it would be. Here that is held against the memory of the device and of
the host, and against the budget of seconds for which devices may be held for nobody
(`allotment.py`). Who is to rise does so where there is room that nobody has or waits for, one start
at a time, and never while one starts for which somebody waits.

Models are `Candidate`s and time is a clock's: the endpoint and the simulation are seen to alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from coldframe.runtime.endpoint.room import Room
from coldframe.runtime.scaling.allotment import Supply, allot
from coldframe.runtime.scaling.budget import Budget
from coldframe.runtime.scaling.candidate import HELD_S, Candidate

__all__ = ["Foresight"]

_OFTEN_S = 0.25
"""How often it is looked who may be held, in seconds, where nothing makes it sooner."""
_SELDOM_S = 1.0
"""How often where somebody has less than it would: what others are worth changes with time."""
_SOON_S = 1e-3
"""Later than now in any case: sums of seconds are rounded."""

_Models = Sequence[tuple[str, Candidate]]


class Foresight:
    """Sees to all models of a fleet.

    Args:
        room: The device's memory, where they share it.
        budget: Where there is one.
        host_memory: Tells how much there is left of the host's, in bytes.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        room: Room | None,
        budget: Budget | None,
        host_memory: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget
        self._room = room
        self._host_memory = host_memory
        self._clock = clock
        self._looked_at = -math.inf
        self._limited = False
        self._rises = False
        self._held = 0
        self._seen: Sequence[tuple[str, str, str | None]] = ()

    def step(self, models: Iterable[tuple[str, Candidate]]) -> None:
        """Goes on; to be called after something has happened."""
        models = list(models)
        self._count(models)
        rising = [model for _, model in models if model.rising is not None]
        if rising or self.budget is not None or self._limited:
            self._allot(models)
        starting = any(model.state == "starting" for _, model in models)
        for model in rising:
            level = model.rising
            if level is not None and not (starting and model.state == "zero"):
                model.rise(level)
                starting = starting or model.state == "starting"
        self._rises = any(model.rising is not None for model in rising)
        self._count(models)

    @property
    def wait_s(self) -> float:
        """How long nothing is to be done unless something happens, in seconds."""
        wait_s = _SELDOM_S if self._limited or self._rises else math.inf
        if self.budget is not None:
            wait_s = min(wait_s, self.budget.wait_s(self._held * HELD_S))
        return max(wait_s, self._looked_at + _OFTEN_S - self._clock(), _SOON_S)

    def may_begin(self, model: Candidate) -> bool:
        """Whether what is left of the budget is enough for a start that nobody has asked for."""
        return self.budget is None or self.budget.left >= model.begin_s

    def _count(self, models: _Models) -> None:
        """Who is held for nobody from now on."""
        self._held = sum(model.devices_unasked for _, model in models)
        if self.budget is not None:
            self.budget.hold(self._held)

    def _allot(self, models: _Models) -> None:
        moment = self._clock()
        seen = [(name, model.state, model.rising) for name, model in models]
        if seen == self._seen and moment - self._looked_at < _OFTEN_S:
            return
        self._looked_at, self._seen = moment, seen
        wishes = [model.wish(name) for name, model in models]
        host = None
        if self._host_memory is not None and any(wish.need("parked").host for wish in wishes):
            there = sum(model.bytes_parked for _, model in models)
            host = self._host_memory() + there
        supply = Supply(
            None if self._room is None else self._room.total,
            host,
            None if self.budget is None else self.budget.left,
        )
        levels = allot(wishes, supply)
        self._limited, gone = False, []
        for wish, (name, model) in zip(wishes, models, strict=True):
            put_down = wish.level != levels[name]
            model.unasked.most = levels[name] if put_down else "warm"
            self._limited = self._limited or put_down
            if put_down and model.rising is None:
                model.unasked.foregone = True  # or it would come and go
                gone.append(model)
        for model in gone:
            model.follow()
