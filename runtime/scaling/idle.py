"""What is known of one model's idle times: a histogram that fades, and a forecast.

They are what `scaling.histogram` decides by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate

__all__ = ["Forecast", "IdleHistogram"]

_ALPHA = 0.3
"""How much the latest idle time counts in the forecast."""
_LEAST_FORECAST = 3
_LEAST_MARGIN = 0.15
"""The paper's margin of a forecast."""
_SIGMAS = 2.0
_MOST_MARGIN = math.log(2)


class IdleHistogram:
    """Idle times by bins of one width, up to a range.

    Args:
        bin_s: A bin's width, in seconds.
        range_s: Idle times up to there are in bins, the others only counted.
    """

    def __init__(self, bin_s: float, range_s: float) -> None:
        self.bin_s = bin_s
        self.counts = [0.0] * max(1, math.ceil(range_s / bin_s))
        self.beyond = 0.0
        """How many idle times were out of range."""
        self.within = 0.0
        self._squares = 0.0
        self._below: list[float] | None = None
        """How many there are in the bins before each one, as long as that is so."""

    def add(self, idle_s: float) -> None:
        """Counts one more."""
        place = int(idle_s / self.bin_s)
        if place >= len(self.counts):
            self.beyond += 1
            return
        # (c + 1)^2 - c^2: the sum of squares is kept, for the variation at any time.
        self._squares += 2 * self.counts[place] + 1
        self.counts[place] += 1
        self.within += 1
        self._below = None

    def fade(self, part: float) -> None:
        """All that there are count for such a part of what they did."""
        self._take([count * part for count in self.counts], self.beyond * part)

    def _take(self, counts: list[float], beyond: float) -> None:
        self.counts, self.beyond, self.within = counts, beyond, math.fsum(counts)
        self._squares = math.fsum(count * count for count in counts)
        self._below = None

    @property
    def total(self) -> float:
        return self.within + self.beyond

    @property
    def variation(self) -> float:
        """The coefficient of variation of the bins' counts; 0 where there is nothing in them."""
        if self.within == 0:
            return 0.0
        mean = self.within / len(self.counts)
        return math.sqrt(max(0.0, self._squares / len(self.counts) - mean * mean)) / mean

    def percentile(self, percent: float, *, up: bool) -> float:
        """Where so many per cent of the idle times in range are below.

        Args:
            percent: How many.
            up: Whether it is rounded up to its bin's end, instead of down to its beginning.

        Returns:
            Seconds; 0 where there are none.
        """
        # What fades leaves sums that are wrong in their last places.
        wanted, seen, last = self.within * percent / 100 * (1 - 1e-9), 0.0, 0.0
        for place, count in enumerate(self.counts):
            if count:
                seen, last = seen + count, (place + up) * self.bin_s
                if seen >= wanted:
                    break
        return last

    def chance(self, idle_s: float, within_s: float) -> float:
        """How likely an idle time that has lasted so long ends within so long a time."""
        ends = self._up_to(idle_s + within_s) - self._up_to(idle_s)
        left = self.total - self._up_to(idle_s)
        return min(1.0, max(0.0, ends / left)) if left > 0 else 0.0

    def _up_to(self, seconds: float) -> float:
        """How many idle times are shorter, taking a bin's to be spread over it."""
        place = seconds / self.bin_s
        whole = min(int(place), len(self.counts))
        part = self.counts[whole] * (place - whole) if whole < len(self.counts) else 0.0
        if self._below is None:
            self._below = list(accumulate(self.counts, initial=0.0))
        return self._below[whole] + part

    def load(self, filled: Mapping[str, float], beyond: float) -> None:
        """Takes the counts of another one.

        Raises:
            ValueError, TypeError: They cannot be.
        """
        counts = [0.0] * len(self.counts)
        for place, count in filled.items():
            if not 0 <= int(place) < len(counts) or not _counts(count):
                raise ValueError("these are no counts of such a histogram")
            counts[int(place)] = count
        if not _counts(beyond):
            raise ValueError("these are no counts of such a histogram")
        self._take(counts, beyond)


def _counts(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15  # type: ignore[operator]


class Forecast:
    """The next idle time, by exponential smoothing of the logarithms of those before."""

    def __init__(self) -> None:
        self.count = 0
        self.level = 0.0
        """The logarithm of the next one, in seconds, as it is expected."""
        self.variance = 0.0
        """Of the errors so far, the latest ones foremost."""

    def add(self, idle_s: float) -> None:
        """One more."""
        value = math.log(max(idle_s, 1e-3))
        if self.count == 0:
            self.level = value
        else:
            error = value - self.level
            # The first error stands for all that there were: none is no reason to be sure.
            part = 1.0 if self.count == 1 else _ALPHA
            self.variance += part * (error * error - self.variance)
            self.level += _ALPHA * error
        self.count += 1

    @property
    def window(self) -> tuple[float, float] | None:
        """Between which seconds the next one ends; None where that cannot be said."""
        margin = max(math.log1p(_LEAST_MARGIN), _SIGMAS * math.sqrt(self.variance))
        if self.count < _LEAST_FORECAST or margin > _MOST_MARGIN:
            return None
        return math.exp(self.level - margin), math.exp(self.level + margin)
