"""A limit on the rate of a load, as a link has one."""

from __future__ import annotations

import threading
import time

__all__ = ["Throttle"]


class Throttle:
    """Makes a source as slow as a link of the given rate: a byte is there when it could be.

    Args:
        rate: Bytes per second.
    """

    # What a link may catch up after a hiccup of the reader: its buffers hold some milliseconds.
    _SLACK_S = 0.02

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._arrives: float | None = None
        self._lock = threading.Lock()

    def book(self, nbytes: int) -> float:
        """Reserves the link for so many bytes; returns when they have passed (monotonic s)."""
        with self._lock:
            earliest = time.monotonic()
            if self._arrives is not None:
                earliest = max(self._arrives, earliest - self._SLACK_S)
            self._arrives = earliest + nbytes / self.rate
            return self._arrives
