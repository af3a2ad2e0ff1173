"""When a model that nobody asks is warm, parked or at zero: policies and nothing else.

A policy watches one model's requests come and says, whenever nobody is being answered, what is to
become of it from then on, as a *schedule*: which level it is to be at, by how long nobody has
asked. `warm for 60 s, parked until 300 s, zero from there on, and warm again at 3,500 s` is one.
Whoever follows it needs to know nothing of how it was found, so that the endpoint and the
simulation (`benchmarks/traffic`) follow the same.

    FixedKeepAlive    the same for everybody                       here
    HybridHistogram   by the histogram of a model's idle times     `scaling.histogram`
    NextArrival       by what holding costs and what waiting does  `scaling.next`

`scaling.spec.policy_from` makes them of a text. Who may have what it wants where there is not
enough for all is `allotment`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

__all__ = [
    "LEVELS",
    "FixedKeepAlive",
    "Level",
    "LivePolicy",
    "Policy",
    "PolicyFactory",
    "Schedule",
    "chance_unknown",
    "learned_start",
    "standard",
]

Level = Literal["zero", "parked", "warm"]
LEVELS: tuple[Level, ...] = ("zero", "parked", "warm")
"""From what holds least to what holds most."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """What is to become of a model that nobody asks.

    A step says when the way to its level *begins*. Going up takes as long as a start does: whoever
    wants a model to be warm at 100 s has it begin that much earlier.

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

    def rises(self, idle_s: float) -> bool:
        """Whether it has gone up to the level at which it is to be then."""
        passed = [level for at_s, level in self.steps if at_s <= idle_s]
        return len(passed) > 1 and LEVELS.index(passed[-1]) > LEVELS.index(passed[-2])

    def will_rise(self, idle_s: float) -> bool:
        """Whether it goes up again after so many seconds."""
        levels = [LEVELS.index(level) for at_s, level in self.steps if at_s > idle_s]
        levels.insert(0, LEVELS.index(self.level(idle_s)))
        return any(low < high for low, high in pairwise(levels))

    def to_json(self) -> list[list[Any]]:
        """The steps, as JSON values."""
        return [[round(at_s, 3), level] for at_s, level in self.steps]


class Policy(Protocol):
    """One model's."""

    def arrived(self, at_s: float) -> None:
        """A request has come.

        Args:
            at_s: When, in seconds of a clock that never goes back, whatever its zero is.
        """
        ...

    def idle(self, at_s: float) -> Schedule:
        """Nobody is being answered from now on: what is to become of it, until somebody asks.

        Where nobody has asked since this was called last, somebody has had it started for nobody.
        """
        ...


class LivePolicy(Policy, Protocol):
    """One that an endpoint follows, which also tells of itself and outlives a process."""

    @property
    def name(self) -> str:
        """What it is called where it is chosen."""
        ...

    @property
    def why(self) -> str:
        """What the last schedule follows from, in a sentence."""
        ...

    @property
    def parks(self) -> bool:
        """Whether a model may be parked at all."""
        ...

    @property
    def always(self) -> bool:
        """Whether a model is to be warm for good."""
        ...

    def started(self, level: Level, seconds: float) -> None:
        """A start has taken so long.

        Args:
            level: Where from: `zero` or `parked`.
            seconds: Until it could answer.
        """
        ...

    def chance(self, idle_s: float, within_s: float) -> float:
        """How likely somebody asks soon.

        Args:
            idle_s: For how long nobody has.
            within_s: Within which time from then on.

        Returns:
            A probability.
        """
        ...

    def saved(self, at_s: float) -> dict[str, Any]:
        """What it has learned, as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any], at_s: float, away_s: float) -> None:
        """Goes on from what another one has learned.

        Args:
            state: What `saved` gave.
            at_s: The time now.
            away_s: How long ago that was.

        Raises:
            ValueError, TypeError, KeyError: It is none, or another policy's; nothing has changed.
        """
        ...


_START_ALPHA = 0.5
"""How much the latest start counts."""
_MOST_START_S = 3600.0


def learned_start(before_s: float, seconds: float) -> float:
    """How long a start is taken to take, now that one more was seen.

    One that took an hour or longer counts as an hour: it has waited for something else.

    Args:
        before_s: What it was taken to take.
        seconds: What it has taken.
    """
    if not seconds >= 0:
        return before_s
    return before_s + _START_ALPHA * (min(seconds, _MOST_START_S) - before_s)


def chance_unknown(idle_s: float, within_s: float) -> float:
    """How likely somebody asks within so long, where nothing is known of the scale of time.

    Who was silent for t is so for t more, half of the times.
    """
    return within_s / (within_s + idle_s) if within_s + idle_s > 0 else 1.0


def standard(keep_s: float) -> Schedule:
    """Warm for so long, then at zero: what a policy says that does not know better."""
    return Schedule(((0.0, "warm"), (keep_s, "zero")))


PolicyFactory = Callable[[], Policy]
"""Makes a policy for each model."""


class FixedKeepAlive:
    """The same for everybody: warm for a time, then parked for a time, then zero.

    Args:
        idle_s: How long it stays warm, in seconds; None for ever.
        park_s: How long it is parked then; 0 for not at all, None for ever.
    """

    name = "fixed"

    def __init__(self, idle_s: float | None = None, park_s: float | None = 0.0) -> None:
        self.idle_s, self.park_s = idle_s, park_s
        steps: list[tuple[float, Level]] = []
        if idle_s != 0:
            steps.append((0.0, "warm"))
        if idle_s is not None and park_s != 0:
            steps.append((idle_s, "parked"))
        if idle_s is not None and park_s is not None:
            steps.append((idle_s + park_s, "zero"))
        self._schedule = Schedule(tuple(steps))
        self.parks, self.always = park_s != 0, idle_s is None
        self.why = "the same for all"

    def arrived(self, at_s: float) -> None:
        pass

    def idle(self, at_s: float) -> Schedule:
        return self._schedule

    def started(self, level: Level, seconds: float) -> None:
        pass

    def chance(self, idle_s: float, within_s: float) -> float:
        return chance_unknown(idle_s, within_s)

    def saved(self, at_s: float) -> dict[str, Any]:
        return {"policy": self.name}

    def restore(self, state: Mapping[str, Any], at_s: float, away_s: float) -> None:
        if state["policy"] != self.name:
            raise ValueError(f"this is of the policy {state['policy']!r}")
