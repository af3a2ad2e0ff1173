"""A policy by what holding costs and what waiting costs, and when the next request may come.

To hold a model costs 1 for each second that it is warm or starts, less while it is parked, nothing
at zero. A request that finds it colder waits as long as the start from there takes, and each of
these seconds costs a penalty as well. Which level is cheapest at each moment of the idle time
follows from when the next request may come (`scaling.arrivals`), by dynamic programming from the
end of time backwards (Bellman 1957): a start that is begun costs its seconds, and pays only where
it is likely to be done in time.

With requests at random that is the well-known rule to keep a model warm for as long as it takes
until holding it has cost what the start would, as soon as the rate is learned: at once zero, or
always warm. With requests by a timer it is at zero in between and there again before the next one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from coldframe.runtime.scaling.arrivals import EDGES, Arrivals
from coldframe.runtime.scaling.policies import (
    LEVELS,
    Level,
    Schedule,
    chance_unknown,
    learned_start,
    standard,
)

__all__ = ["Costs", "NextArrival", "cheapest"]


class Costs:
    """What holding and waiting cost.

    Args:
        penalty: What a client's second of waiting costs, in seconds of a warm model.
        parked: What a second parked costs, in the same; 1 or more never parks.
        zero_s: How long a start from zero takes, in seconds.
        parked_s: How long it takes from parked.
    """

    def __init__(
        self,
        penalty: float = 30.0,
        parked: float = 0.1,
        zero_s: float = 10.0,
        parked_s: float = 1.0,
    ) -> None:
        self.penalty = penalty
        self.hold: dict[Level, float] = {"zero": 0.0, "parked": parked, "warm": 1.0}
        self.start_s: dict[Level, float] = {"zero": zero_s, "parked": parked_s, "warm": 0.0}

    def started(self, level: Level, seconds: float) -> None:
        """A start has taken so long."""
        self.start_s[level] = learned_start(self.start_s[level], seconds)


def cheapest(survival: Sequence[float], costs: Costs) -> list[tuple[float, Level]]:
    """The levels that are cheapest at each moment, for a model that is warm and idle.

    Args:
        survival: The probabilities that nobody has asked until each of EDGES.
        costs: What it is reckoned with.

    Returns:
        The steps of a schedule.
    """
    levels = [level for level in LEVELS if level != "parked" or costs.hold["parked"] < 1]
    hold = [costs.hold[level] for level in levels]
    waits = [(costs.penalty + 1) * costs.start_s[level] for level in levels]
    last = len(EDGES) - 1
    # What it costs from an edge on to be at a level, before one may go to another one there.
    value = [survival[last] * waits[0]] * len(levels)
    choices: list[list[int]] = []
    for place in range(last - 1, -1, -1):
        comes = survival[place] - survival[place + 1]
        held_s = (survival[place] + survival[place + 1]) / 2 * (EDGES[place + 1] - EDGES[place])
        stay = [h * held_s + w * comes + v for h, w, v in zip(hold, waits, value, strict=True)]
        choice: list[int] = []
        value = []
        for here, level in enumerate(levels):
            # Of what costs the same the least: what cannot be known is not worth holding.
            to = min(range(here + 1), key=stay.__getitem__)
            if here + 1 < len(levels):
                above = min(range(here + 1, len(levels)), key=stay.__getitem__)
                if stay[above] < stay[to]:
                    start_s = costs.start_s[level]
                    # While it starts it is held as if it were warm, whatever it is to be then.
                    cost = stay[above] + survival[place] * start_s * (1 - hold[above])
                    if cost < stay[to]:  # else it need not be known how late it would be
                        cost += costs.penalty * _late(survival, place, start_s)
                    if cost < stay[to]:
                        value.append(cost)
                        choice.append(above)
                        continue
            value.append(stay[to])
            choice.append(to)
        choices.append(choice)
    steps: list[tuple[float, Level]] = []
    at = len(levels) - 1
    for place, choice in enumerate(reversed(choices)):
        at = choice[at]
        if not steps or steps[-1][1] != levels[at]:
            steps.append((EDGES[place], levels[at]))
    if steps[-1][1] != "zero":
        steps.append((EDGES[-1], "zero"))
    return steps


def _late(survival: Sequence[float], place: int, start_s: float) -> float:
    """How long a client is expected to wait for a start that begins at an edge, in seconds.

    Who comes while it goes on waits for what is left of it.
    """
    begin_s, waits, at = EDGES[place], 0.0, place
    while at < len(EDGES) - 1 and EDGES[at] < begin_s + start_s:
        width_s = EDGES[at + 1] - EDGES[at]
        covered_s = min(EDGES[at + 1], begin_s + start_s) - EDGES[at]
        left_s = begin_s + start_s - EDGES[at] - covered_s / 2
        waits += (survival[at] - survival[at + 1]) * covered_s / width_s * left_s
        at += 1
    return waits


class NextArrival:
    """A model's levels by when its next request may come.

    Args:
        costs: What holding and waiting cost; its start times are learned from then on.
        samples: How many idle times there must be before it is trusted.
        keep_s: How long the model is kept warm until then, in seconds, and where somebody had it
            started for nobody.
    """

    name = "next"
    always = False

    def __init__(self, costs: Costs | None = None, samples: int = 3, keep_s: float = 600.0) -> None:
        self.costs = costs or Costs()
        self.arrivals = Arrivals()
        self.parks = self.costs.hold["parked"] < 1
        self.why = "nobody has asked yet"
        self._samples, self._keep_s = samples, keep_s
        self._survival: list[float] | None = None
        self._idle_since: float | None = None
        self._asked = False
        self._ever_asked = False

    def arrived(self, at_s: float) -> None:
        idle_s = None
        if self._idle_since is not None and self._ever_asked:
            idle_s = max(0.0, at_s - self._idle_since)
        self.arrivals.arrived(at_s, idle_s)
        self._idle_since = None
        self._asked = self._ever_asked = True

    def idle(self, at_s: float) -> Schedule:
        asked, self._asked = self._asked, False
        if self._idle_since is None:
            self._idle_since = at_s
        if not asked:
            self.why = "standard keep-alive: nobody has asked since it was started"
            return standard(self._keep_s)
        self._survival = self.arrivals.survival(at_s)
        if self.arrivals.seen < self._samples:
            self.why = f"standard keep-alive: {self.arrivals.seen} idle times seen"
            self.why += f" of {self._samples}"
            return standard(self._keep_s)
        best = self.arrivals.best
        half = next((e for e, s in zip(EDGES, self._survival, strict=True) if s <= 0.5), None)
        self.why = f"half of the next requests come within {half or EDGES[-1]:.3g} s"
        self.why += f"; {best} guesses best ({self.arrivals.weights[best]:.0%})"
        return Schedule(tuple(cheapest(self._survival, self.costs)))

    def started(self, level: Level, seconds: float) -> None:
        self.costs.started(level, seconds)

    def chance(self, idle_s: float, within_s: float) -> float:
        if self._survival is None or self.arrivals.seen < self._samples:
            return chance_unknown(idle_s, within_s)
        left = _at(self._survival, idle_s)
        return 1 - _at(self._survival, idle_s + within_s) / left if left > 0 else 0.0

    def saved(self, at_s: float) -> dict[str, Any]:
        return {
            "policy": self.name,
            "arrivals": self.arrivals.saved(at_s),
            "start_s": [self.costs.start_s["zero"], self.costs.start_s["parked"]],
            "idle_s": None if self._idle_since is None else at_s - self._idle_since,
            "asked": self._ever_asked,
        }

    def restore(self, state: Mapping[str, Any], at_s: float, away_s: float) -> None:
        if state["policy"] != self.name:
            raise ValueError(f"this is of the policy {state['policy']!r}")
        arrivals = Arrivals.load(state["arrivals"], at_s - away_s)
        zero_s, parked_s = (float(seconds) for seconds in state["start_s"])
        if not (0 <= zero_s < 1e6 and 0 <= parked_s < 1e6):
            raise ValueError("these are no times of starts")
        idle_s = state["idle_s"]
        since = None if idle_s is None else at_s - away_s - float(idle_s)
        self.arrivals = arrivals
        self.costs.start_s["zero"], self.costs.start_s["parked"] = zero_s, parked_s
        self._idle_since, self._ever_asked = since, bool(state["asked"])


def _at(survival: Sequence[float], seconds: float) -> float:
    """The probability that nobody has come by then, between two edges by their line."""
    if seconds >= EDGES[-1]:
        return survival[-1]
    place = bisect_right(EDGES, seconds) - 1
    part = (seconds - EDGES[place]) / (EDGES[place + 1] - EDGES[place])
    return survival[place] + part * (survival[place + 1] - survival[place])
