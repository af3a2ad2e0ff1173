"""When a model that nobody asks is warm, parked or at zero: policies and nothing else.

A policy watches one model's requests come and says, whenever nobody is being answered, what is to
become of it from then on, as a *schedule*: which level it is to be at, by how long nobody has
asked. `warm for 60 s, parked until 300 s, zero from there on, and warm again at 3,500 s` is one.
Whoever follows it needs to know nothing of how it was found, so that the endpoint and the
simulation (`benchmarks/traffic`) follow the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["FixedKeepAlive", "Level", "Policy", "PolicyFactory", "Schedule"]

Level = Literal["zero", "parked", "warm"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is to become of a model that nobody asks.

    Args:
        steps: From when on it is to be at which level, in seconds since the last answer ended; in
            their order, the first at 0.
    """

    steps: tuple[tuple[float, Level], ...]

    def level(self, idle_s: float) -> Level:
        """The level it is to be at after so many seconds."""
        return next(level for at_s, level in reversed(self.steps) if at_s <= idle_s)

    def next_s(self, idle_s: float) -> float | None:
        """When it changes next, in seconds since the last answer; None where it does not."""
        return next((at_s for at_s, _ in self.steps if at_s > idle_s), None)


class Policy(Protocol):
    """One model's."""

    def arrived(self, at_s: float) -> None:
        """A request has come.

        Args:
            at_s: When, in seconds of a clock that never goes back, whatever its zero is.
        """
        ...

    def idle(self, at_s: float) -> Schedule:
        """Nobody is being answered from now on: what is to become of it, until somebody asks."""
        ...


PolicyFactory = Callable[[], Policy]
"""Makes a policy for each model."""


class FixedKeepAlive:
    """The same for everybody: warm for a time, then parked for a time, then zero.

    Args:
        idle_s: How long it stays warm, in seconds; None for ever.
        park_s: How long it is parked then; 0 for not at all, None for ever.
    """

    def __init__(self, idle_s: float | None, park_s: float | None = 0.0) -> None:
        steps: list[tuple[float, Level]] = []
        if idle_s != 0:
            steps.append((0.0, "warm"))
        if idle_s is not None and park_s != 0:
            steps.append((idle_s, "parked"))
        if idle_s is not None and park_s is not None:
            steps.append((idle_s + park_s, "zero"))
        self._schedule = Schedule(tuple(steps))

    def arrived(self, at_s: float) -> None:
        pass

    def idle(self, at_s: float) -> Schedule:
        return self._schedule
