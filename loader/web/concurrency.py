"""How many ranges are read at once: as many as make the load faster, and no more.

One connection seldom fills a path: a store gives each so much and no more, and TCP's window sets a
bound over a long way. Too many cost memory, keep the first stage waiting and make a store refuse.
So the number grows while the measured rate grows with it, and is halved when the other side says
that it has too much to do.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Limiter"]

_WINDOW_S = 0.25
_WINDOW_BYTES = 2 << 20
"""What a rate is measured over: so long, and so many bytes for each that may read. Less would be
noise, for bytes are known to have come about a megabyte at a time."""

_GROWTH = 1.5
_WORTH = 1.1
"""So many times the rate must have grown for a larger number to stay."""

_REST_S = 5.0
"""After a step back nothing is tried for so long."""

_CALM_S = 1.0
"""Refusals that come so soon after one are of requests that were sent before it."""


class Limiter:
    """Lets some threads read and others wait, in the order in which they came.

    Args:
        first: How many may read at the start.
        most: And ever.
        clock: Monotonic seconds.

    Attributes:
        peak: The most that have read at once.
    """

    def __init__(self, first: int, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = max(1, most)
        self._limit = max(1, min(first, self._most))
        self._clock = clock
        self._lock = threading.Lock()
        self._running = 0
        self.peak = 0
        self._waiting: deque[threading.Event] = deque()
        self._closed = False
        self._bytes = 0
        self._since: float | None = None
        self._bound = False  # by the limit, at some time in the present window
        self._before: tuple[int, float] | None = None  # limit and rate before the last growth
        self._settling = False
        self._rest_until = 0.0
        self._calm_after: float | None = None

    @property
    def limit(self) -> int:
        """How many may read now."""
        return self._limit

    @property
    def calm(self) -> bool:
        """Whether the other side has not complained lately."""
        return self._calm_after is None or self._clock() >= self._calm_after + _REST_S

    def acquire(self, *, urgent: bool = False) -> bool:
        """Waits for the right to read one range; `release` gives it back.

        Args:
            urgent: Before all others who wait: for a range that was begun already, since later
                ones are not wanted before it.

        Returns:
            Whether it was got; not when the limiter was closed.
        """
        with self._lock:
            if self._closed:
                return False
            if self._running < self._limit and (urgent or not self._waiting):
                self._enter()
                return True
            self._bound = True
            turn = threading.Event()
            if urgent:
                self._waiting.appendleft(turn)
            else:
                self._waiting.append(turn)
        turn.wait()
        return not self._closed

    def release(self) -> None:
        """The range has been read, or could not be."""
        with self._lock:
            self._running -= 1
            self._let_in()

    def moved(self, nbytes: int) -> None:
        """So many bytes have come."""
        with self._lock:
            now = self._clock()
            if self._since is None:
                self._since = now
            self._bytes += nbytes
            elapsed = now - self._since
            if elapsed < _WINDOW_S or self._bytes < _WINDOW_BYTES * self._limit:
                return
            rate = self._bytes / elapsed
            bound, self._bound = self._bound, bool(self._waiting)
            self._bytes, self._since = 0, now
            self._judge(rate, bound, now)
            self._let_in()

    def slow_down(self) -> None:
        """The other side has too much to do."""
        with self._lock:
            now = self._clock()
            self._before, self._settling = None, False
            self._rest_until = now + _REST_S
            if self._calm_after is None or now >= self._calm_after:
                self._limit = max(1, self._limit // 2)
                self._calm_after = now + _CALM_S

    def close(self) -> None:
        """Whoever waits is sent away."""
        with self._lock:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().set()

    def _judge(self, rate: float, bound: bool, now: float) -> None:
        """What the rate of the last window means for the limit."""
        if self._settling:
            # Connections that were just opened have yet to find their rate.
            self._settling = False
            return
        if self._before is not None:
            limit, before = self._before
            self._before = None
            if rate < _WORTH * before:
                self._limit = limit
                self._rest_until = now + _REST_S
                return
        if bound and now >= self._rest_until and self._limit < self._most:
            self._before = (self._limit, rate)
            self._limit = min(self._most, int(self._limit * _GROWTH) + 1)
            self._settling = True

    def _let_in(self) -> None:
        while self._waiting and self._running < self._limit:
            self._enter()
            self._waiting.popleft().set()

    def _enter(self) -> None:
        self._running += 1
        self.peak = max(self.peak, self._running)
