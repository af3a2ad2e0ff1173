"""Starts at the same time: each takes longer for the others.

What they share, cores or the path that weights come by, is divided equally: while n of them go on,
each gets on at 1 / (1 + (n - 1) * beside) of the pace that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coldframe.benchmarks.traffic.service import Clock

__all__ = ["Loading"]


@dataclass(slots=True, eq=False)
class _Start:
    left_s: float
    beside: float
    call: Callable[[], None]


class Loading:
    """Those that are under way.

    Args:
        clock: The simulation's.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._starts: list[_Start] = []
        self._since = 0.0
        self._change = 0

    def add(self, seconds: float, beside: float, call: Callable[[], None]) -> Callable[[], None]:
        """One more.

        Args:
            seconds: How long it takes alone.
            beside: By which part longer for each other one.
            call: Called when it is done.

        Returns:
            What ends it before.
        """
        self._catch_up()
        start = _Start(seconds, beside, call)
        self._starts.append(start)
        self._expect()
        return lambda: self._end(start)

    def _end(self, start: _Start) -> None:
        if start in self._starts:
            self._catch_up()
            self._starts.remove(start)
            self._expect()

    def _pace(self, start: _Start) -> float:
        return 1 / (1 + (len(self._starts) - 1) * start.beside)

    def _catch_up(self) -> None:
        passed_s, self._since = self._clock.now - self._since, self._clock.now
        for start in self._starts:
            start.left_s -= passed_s * self._pace(start)

    def _expect(self) -> None:
        self._change += 1
        if self._starts:
            change, first = self._change, min(self._starts, key=self._takes_s)
            done_s = self._clock.now + max(0.0, self._takes_s(first))
            self._clock.at(done_s, lambda: self._done(change, first))

    def _takes_s(self, start: _Start) -> float:
        return start.left_s / self._pace(start)

    def _done(self, change: int, start: _Start) -> None:
        if change == self._change:
            self._catch_up()
            self._starts.remove(start)
            self._expect()
            start.call()
