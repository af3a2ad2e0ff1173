"""The hybrid histogram policy of "Serverless in the Wild" (Shahrad et al., USENIX ATC 2020).

For each model it counts how long nobody asked, from the end of the last answer to the next request,
in a histogram of a limited range. Its 5th percentile, rounded down to a bin's edge, says when the
next request comes at the earliest; its 99th, rounded up, when at the latest, each with a margin of
10 %. In between the model is warm, before it is at rest, unless it would hardly be.

A histogram that says nothing is not used: with few idle times in it, or where its bins are all
about as full (their coefficient of variation is below 2), the model is kept for a standard time.
Where most idle times are beyond the range, the next one is forecast. The paper has ARIMA for that;
here it is simple exponential smoothing of their logarithms (Brown 1959; it is the ARIMA(0,1,1) of
them, Muth 1960), with its smoothed error as the margin: a few numbers, no fitting, and idle times
differ by factors, not by sums. A forecast that is wrong by a factor of 2 is none.

Theirs are bins of a minute and functions that load within one. Bins are finer here, and a start is
begun earlier by as long as it takes. They keep windows of recent days; here is one histogram
whose counts fade with time, to a half in a week, so that what a model's traffic was does not rule
for ever over what it has become.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from coldframe.runtime.scaling.idle import Forecast, IdleHistogram
from coldframe.runtime.scaling.policies import (
    Level,
    Schedule,
    chance_unknown,
    learned_start,
    standard,
)

__all__ = ["HybridHistogram"]

_OFTEN_S = 3600.0
"""How often counts fade, in seconds."""


class HybridHistogram:
    """A model's keep-alive and pre-warming by the histogram of its idle times.

    Args:
        bin_s: Width of a bin, in seconds; the paper's are 60.
        range_s: Idle times up to there are in the histogram, in seconds.
        head: The percentile before which it need not be warm.
        tail: The percentile up to which it is kept warm.
        margin: By which part the two are moved apart.
        keep_s: How long it is kept warm where the histogram says nothing; the paper takes its
            range.
        cv: How much the bins' counts must vary for the histogram to say something.
        oob: From which share of idle times out of range on they are forecast.
        samples: How many idle times there must be.
        rest: Where it is until it is warmed ahead: at `zero` or `parked`.
        start_s: How long a start takes, in seconds, until one was seen (`started`).
        half_s: After how long an idle time counts for a half, in seconds.
    """

    name = "histogram"
    always = False

    def __init__(
        self,
        bin_s: float = 10.0,
        range_s: float = 14400.0,
        head: float = 5.0,
        tail: float = 99.0,
        margin: float = 0.1,
        keep_s: float = 600.0,
        cv: float = 2.0,
        oob: float = 0.5,
        samples: int = 8,
        rest: Literal["zero", "parked"] = "zero",
        start_s: float = 5.0,
        half_s: float = 7 * 86400.0,
    ) -> None:
        self.histogram = IdleHistogram(bin_s, range_s)
        self.forecast = Forecast()
        self.parks = rest == "parked"
        self.why = "nobody has asked yet"
        self._head, self._tail, self._margin = head, tail, margin
        self._keep_s, self._cv, self._oob, self._samples = keep_s, cv, oob, samples
        self._rest: Level = rest
        self._start_s = start_s
        self._half_s = half_s
        self._faded_at: float | None = None
        self._idle_since: float | None = None
        self._asked = False
        """Whether somebody has asked since it was idle last."""
        self._ever_asked = False

    def arrived(self, at_s: float) -> None:
        self._fade(at_s)
        if self._idle_since is not None and self._ever_asked:
            idle_s = max(0.0, at_s - self._idle_since)
            self.histogram.add(idle_s)
            self.forecast.add(idle_s)
        self._idle_since = None
        self._asked = self._ever_asked = True

    def _fade(self, at_s: float) -> None:
        passed_s = 0.0 if self._faded_at is None else at_s - self._faded_at
        if self._faded_at is None or passed_s >= _OFTEN_S:
            self._faded_at = at_s
            self.histogram.fade(0.5 ** (passed_s / self._half_s))

    def idle(self, at_s: float) -> Schedule:
        if self._idle_since is None:
            self._idle_since = at_s
        asked, self._asked = self._asked, False
        if not asked:
            return self._standard("nobody has asked since it was started")
        seen, samples = self.histogram, self.histogram.total
        if round(samples) < self._samples:
            return self._standard(f"{samples:.0f} idle times of {self._samples} seen")
        if seen.beyond >= self._oob * samples:
            return self._forecast()
        if seen.variation < self._cv:
            return self._standard(f"the histogram says nothing: its CV is {seen.variation:.2f}")
        head_s = seen.percentile(self._head, up=False)
        tail_s = seen.percentile(self._tail, up=True)
        self.why = f"of {samples:.0f} idle times {self._head:g} % end by {head_s:g} s"
        self.why += f", {self._tail:g} % by {tail_s:g} s"
        return self._between(head_s * (1 - self._margin), tail_s * (1 + self._margin))

    def started(self, level: Level, seconds: float) -> None:
        if level == self._rest:
            self._start_s = learned_start(self._start_s, seconds)

    def chance(self, idle_s: float, within_s: float) -> float:
        seen = self.histogram
        if round(seen.total) < self._samples or seen.beyond >= self._oob * seen.total:
            return chance_unknown(idle_s, within_s)
        return seen.chance(idle_s, within_s)

    def _standard(self, why: str) -> Schedule:
        self.why = f"standard keep-alive: {why}"
        return standard(self._keep_s)

    def _forecast(self) -> Schedule:
        window = self.forecast.window
        if window is None:
            return self._standard("idle times are out of range, and no forecast is near enough")
        self.why = f"forecast: the next request between {window[0]:.0f} and {window[1]:.0f} s"
        return self._between(*window)

    def _between(self, from_s: float, to_s: float) -> Schedule:
        """Warm from then to then, where it pays to be less before."""
        begin_s = from_s - self._start_s
        # To be down for no longer than the start takes saves next to nothing.
        if begin_s <= self._start_s:
            return Schedule(((0.0, "warm"), (to_s, "zero")))
        return Schedule(((0.0, self._rest), (begin_s, "warm"), (to_s, "zero")))

    def saved(self, at_s: float) -> dict[str, Any]:
        seen = self.histogram
        return {
            "policy": self.name,
            "bin_s": seen.bin_s,
            "counts": {str(i): round(n, 6) for i, n in enumerate(seen.counts) if n > 1e-6},
            "beyond": round(seen.beyond, 6),
            "faded_s": 0.0 if self._faded_at is None else at_s - self._faded_at,
            "forecast": [self.forecast.count, self.forecast.level, self.forecast.variance],
            "start_s": self._start_s,
            "idle_s": None if self._idle_since is None else at_s - self._idle_since,
            "asked": self._ever_asked,
        }

    def restore(self, state: Mapping[str, Any], at_s: float, away_s: float) -> None:
        if state["policy"] != self.name or state["bin_s"] != self.histogram.bin_s:
            raise ValueError("this is of another policy, or of other bins")
        count, level, variance = state["forecast"]
        numbers = [float(value) for value in (level, variance, state["start_s"])]
        idle_s, faded_s = state["idle_s"], float(state.get("faded_s", 0.0))
        if not 0 <= faded_s < math.inf:
            raise ValueError("this is no time")
        if not all(map(math.isfinite, numbers)) or numbers[1] < 0 or numbers[2] < 0:
            raise ValueError("these are no numbers of a forecast")
        since = None if idle_s is None else at_s - away_s - float(idle_s)
        self.histogram.load(state["counts"], state["beyond"])
        self._faded_at = at_s - away_s - faded_s
        self.forecast.count, self.forecast.level, self.forecast.variance = int(count), *numbers[:2]
        self._start_s = numbers[2]
        self._idle_since, self._ever_asked = since, bool(state["asked"])
