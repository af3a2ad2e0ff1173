"""When the next request comes: single guesses.

    Gaps       as long after the last answer as before: a histogram of idle times by their
               logarithm, in which the old ones fade. Knows timers, and bursts with breaks between
    Rate       at random, as often as of late (Poisson), for several meanings of late. What is not
               known of the rate is counted in: a gamma distribution of it makes the next request's
               that of Lomax
    TimesOf    at random, as often as at this time of the hour, or of the day, before

Each gives the probability that nobody has come, at the edges of the same bins of time. They are
weighed in `scaling.arrivals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["EDGES", "Gaps", "Guess", "Rate", "TimesOf", "number", "place_of"]

_FIRST_S = 0.25
_RATIO = 2 ** (1 / 6)
"""Bins grow by 12 %: what comes every hour is known to within some minutes."""
_DAYS_7 = 7 * 86400.0
EDGES: tuple[float, ...] = (
    0.0,
    *(
        _FIRST_S * _RATIO**i
        for i in range(1 + math.ceil(math.log(_DAYS_7 / _FIRST_S) / math.log(_RATIO)))
    ),
)
"""The edges of the bins, in seconds since nobody asks. What comes later than the last one does not
count as coming."""
_FADE = 0.98
"""What an idle time counts when the next one is there."""
_SMEAR = (0.2, 0.6, 0.2)
"""An idle time is as good as one a little shorter or longer."""
_PERIOD_FADE = 0.7
"""What a period counts when the next one is over."""
_MOST_PERIODS = 6
"""Periods before that have faded: 0.7 to the 6th is a tenth."""


def place_of(idle_s: float) -> int:
    """The bin of an idle time; one more than there are for those beyond."""
    if idle_s < _FIRST_S:
        return 0
    place = 1 + int(math.log(idle_s / _FIRST_S) / math.log(_RATIO))
    return min(place, len(EDGES) - 1)


class Guess(Protocol):
    """One way to guess."""

    def arrived(self, at_s: float) -> None:
        """A request has come."""
        ...

    def waited(self, idle_s: float) -> None:
        """Nobody had asked for so long before it."""
        ...

    def survival(self, at_s: float) -> list[float]:
        """The probabilities that nobody comes until each of EDGES from now on."""
        ...

    def saved(self, at_s: float) -> list[Any]:
        """What it knows, as JSON values; times as how long ago they were."""
        ...

    def load(self, state: Sequence[Any], at_s: float) -> None:
        """Takes what another one knew.

        Args:
            state: What `saved` gave.
            at_s: The time now, less what has passed since.

        Raises:
            ValueError, TypeError: It is none.
        """
        ...


class Gaps:
    """Idle times as they were, the latest ones foremost."""

    def __init__(self) -> None:
        # One idle time's worth of not knowing, spread over all orders of magnitude alike.
        self._prior = 1.0 / len(EDGES)
        self._weights = [0.0] * len(EDGES)

    def arrived(self, at_s: float) -> None:
        pass

    def waited(self, idle_s: float) -> None:
        self._weights = [weight * _FADE for weight in self._weights]
        middle = place_of(idle_s)
        for place, part in zip((middle - 1, middle, middle + 1), _SMEAR, strict=True):
            self._weights[min(max(place, 0), len(EDGES) - 1)] += part

    def survival(self, at_s: float) -> list[float]:
        total = sum(self._weights) + self._prior * len(EDGES)
        left, found = total, [1.0]
        for weight in self._weights[:-1]:
            left -= weight + self._prior
            found.append(max(0.0, left / total))
        return found

    def saved(self, at_s: float) -> list[Any]:
        return [[i, round(weight, 6)] for i, weight in enumerate(self._weights) if weight > 1e-6]

    def load(self, state: Sequence[Any], at_s: float) -> None:
        weights = [0.0] * len(EDGES)
        for place, weight in state:
            if not 0 <= place < len(weights):
                raise ValueError("these are no such bins")
            weights[place] = number(weight)
        self._weights = weights


class Rate:
    """Requests at random, as often as of late.

    Args:
        late_s: For how long one counts: it fades by e in that time, in seconds.
    """

    def __init__(self, late_s: float) -> None:
        self._late_s = late_s
        self._count = 0.0
        self._at_s = 0.0
        self._began_s: float | None = None

    def arrived(self, at_s: float) -> None:
        if self._began_s is None:
            self._began_s = at_s
        self._fade(at_s)
        self._count += 1

    def waited(self, idle_s: float) -> None:
        pass

    def _fade(self, at_s: float) -> None:
        self._count *= math.exp(-max(0.0, at_s - self._at_s) / self._late_s)
        self._at_s = at_s

    def survival(self, at_s: float) -> list[float]:
        self._fade(at_s)
        seen_s = 0.0 if self._began_s is None else at_s - self._began_s
        # How much time the count stands for. Jeffreys' half a request is what is not known.
        scale = max(self._late_s * (1 - math.exp(-seen_s / self._late_s)), 1e-3)
        shape = self._count + 0.5
        return [(1 + edge / scale) ** -shape for edge in EDGES]

    def saved(self, at_s: float) -> list[Any]:
        self._fade(at_s)
        return [self._count, None if self._began_s is None else at_s - self._began_s]

    def load(self, state: Sequence[Any], at_s: float) -> None:
        count, seen_s = state
        count, began_s = number(count), None if seen_s is None else at_s - number(seen_s)
        self._count, self._began_s, self._at_s = count, began_s, at_s


class TimesOf:
    """Requests at random, as often as at this time of a period before.

    Args:
        period_s: The period, in seconds.
        parts: In how many parts it is seen.
    """

    def __init__(self, period_s: float, parts: int) -> None:
        self._period_s, self._parts = period_s, parts
        self._width_s = period_s / parts
        self._counts = [0.0] * parts
        self._seen_s = [0.0] * parts
        self._began_s: float | None = None
        self._at_s = 0.0

    def arrived(self, at_s: float) -> None:
        if self._began_s is None:
            self._began_s = self._at_s = at_s
        self._pass(at_s)
        self._counts[self._part(at_s)] += 1

    def waited(self, idle_s: float) -> None:
        pass

    def _part(self, at_s: float) -> int:
        return int(at_s % self._period_s / self._width_s) % self._parts

    def _pass(self, at_s: float) -> None:
        """Time has gone on: each part that was come to anew counts less of what it was."""
        self._at_s = max(self._at_s, at_s - _MOST_PERIODS * self._period_s)
        while self._at_s < at_s:
            place = math.floor(self._at_s / self._width_s + 1e-9)
            part, end = place % self._parts, (place + 1) * self._width_s
            if self._at_s - place * self._width_s < 1e-6:
                self._counts[part] *= _PERIOD_FADE
                self._seen_s[part] *= _PERIOD_FADE
            self._seen_s[part] += min(end, at_s) - self._at_s
            self._at_s = end if end <= at_s else at_s

    def survival(self, at_s: float) -> list[float]:
        if self._began_s is None:
            return [1.0] * len(EDGES)
        self._pass(at_s)
        total_s = sum(self._seen_s)
        # A part that was hardly seen is as all of them together.
        usual = (sum(self._counts) + 0.5) / max(total_s, self._width_s)
        rates = [
            (count + usual * self._width_s) / (seen_s + self._width_s)
            for count, seen_s in zip(self._counts, self._seen_s, strict=True)
        ]
        sums = [0.0]
        for rate in rates:
            sums.append(sums[-1] + rate * self._width_s)

        def expected(until_s: float) -> float:
            """How many requests there are from the period's beginning to then."""
            whole, within_s = divmod(until_s, self._period_s)
            part = min(int(within_s / self._width_s), self._parts - 1)
            rest = (within_s - part * self._width_s) * rates[part]
            return whole * sums[-1] + sums[part] + rest

        begin_s = at_s % self._period_s
        before = expected(begin_s)
        return [math.exp(-max(0.0, expected(begin_s + edge) - before)) for edge in EDGES]

    def saved(self, at_s: float) -> list[Any]:
        if self._began_s is None:
            return []
        self._pass(at_s)
        phase_s = at_s % self._period_s
        return [phase_s, at_s - self._began_s, list(self._counts), list(self._seen_s)]

    def load(self, state: Sequence[Any], at_s: float) -> None:
        if not state:
            return
        phase_s, seen_s, counts, times = state
        if len(counts) != self._parts or len(times) != self._parts:
            raise ValueError("this is of other parts of a period")
        # The clock has another zero now: parts are turned so that each is when it was.
        turn = round((at_s - number(phase_s)) / self._width_s) % self._parts
        turned = [
            [number(values[(part - turn) % self._parts]) for part in range(self._parts)]
            for values in (counts, times)
        ]
        self._began_s, self._at_s = at_s - number(seen_s), at_s
        self._counts, self._seen_s = turned


def number(value: Any) -> float:
    """A number that was saved.

    Raises:
        ValueError, TypeError: It cannot be one that was.
    """
    found = float(value)
    if not 0 <= found < math.inf:
        raise ValueError(f"{value!r} is no number that could be here")
    return found
