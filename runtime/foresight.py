"""What is done for models that nobody asks: who may be held, and who is there ahead of requests.

Each model's policy says what it would be. Here that is held against the memory of the device and of
the host, and against the budget of seconds for which devices may be held for nobody
(`coldframe.runtime.allotment`). Who is to rise does so where there is room that nobody has or waits
for, one start at a time, and never while one starts for which somebody waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from coldframe.runtime.allotment import Supply, allot
from coldframe.runtime.budget import Budget
from coldframe.runtime.room import Room
from coldframe.runtime.supervisor import Supervisor

__all__ = ["Foresight"]

_OFTEN_S = 0.25
"""How often it is looked who may be held, in seconds, where nothing makes it sooner."""


class Foresight:
    """Sees to all models of a fleet.

    Args:
        room: The device's memory, where they share it.
        budget: Where there is one.
        host_memory: Tells how much there is left of the host's, in bytes.
    """

    def __init__(
        self,
        room: Room | None,
        budget: Budget | None,
        host_memory: Callable[[], int] | None = None,
    ) -> None:
        self.budget = budget
        self._room = room
        self._host_memory = host_memory
        self._looked_at = -_OFTEN_S
        self._limited = False
        self._rising: list[str] = []

    def step(self, models: Iterable[tuple[str, Supervisor]]) -> None:
        """Goes on; to be called after something has happened."""
        models = list(models)
        if self.budget is not None:
            self.budget.spend(sum(model.devices_unasked for _, model in models))
        rising = [(name, model) for name, model in models if model.rising is not None]
        if rising or self.budget is not None or self._limited:
            self._allot(models, [name for name, _ in rising])
        starting = any(model.state == "starting" for _, model in models)
        for _, model in rising:
            level = model.rising
            if level is not None and not (starting and model.state == "zero"):
                model.rise(level)
                starting = starting or model.state == "starting"

    def _allot(self, models: list[tuple[str, Supervisor]], rising: list[str]) -> None:
        moment = time.monotonic()
        if rising == self._rising and moment - self._looked_at < _OFTEN_S:
            return
        self._looked_at, self._rising = moment, rising
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
        self._limited = False
        for wish, (name, model) in zip(wishes, models, strict=True):
            put_down = wish.level != levels[name]
            model.unasked.most = levels[name] if put_down else "warm"
            self._limited = self._limited or put_down
            if put_down and model.rising is None:
                model.unasked.foregone = True  # or it would come and go
