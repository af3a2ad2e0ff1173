"""Which bytes of a file are there, while they come in pieces and in no strict order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

__all__ = ["Intervals"]


class Intervals:
    """A set of offsets, kept as the intervals that it is made of. For one thread at a time."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, start: int, stop: int) -> None:
        """The offsets from `start` up to `stop`, too; whoever touches another is one with it."""
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        behind = bisect_right(self._starts, stop)
        if first < behind:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[behind - 1])
        self._starts[first:behind] = [start]
        self._stops[first:behind] = [stop]

    def covers(self, start: int, stop: int) -> bool:
        """Whether all offsets from `start` up to `stop` are in it."""
        at = bisect_right(self._starts, start) - 1
        return start >= stop or (at >= 0 and self._stops[at] >= stop)

    def __len__(self) -> int:
        """How many intervals it takes."""
        return len(self._starts)
