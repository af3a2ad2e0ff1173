"""Whether a request that failed is sent again, and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from coldframe.loader.errors import SourceBusy, SourceProtocol, SourceUnreachable
from coldframe.loader.web.broken import Broken
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.pool import cancelled_error

__all__ = ["Patience"]


class Patience:
    """The failures of one request. For one thread.

    Args:
        limits: How much there is.
        where: The file and the range, for the error.
        cancelled: Ends a pause.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        limits: Limits,
        where: str,
        cancelled: threading.Event,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._where = where
        self._cancelled = cancelled
        self._clock = clock
        self._since = clock()
        self._failures = 0
        self._redirects = 0
        self._attempts = 0

    def progress(self) -> None:
        """Something came: what failed before does not count any more."""
        self._since = self._clock()
        self._failures = self._redirects = 0

    def excuse(self, seconds: float) -> None:
        """So much time was spent waiting for other ranges, not for the other side."""
        self._since += seconds

    def failed(self, broken: Broken) -> float:
        """Another attempt has failed.

        Returns:
            Seconds to wait before the next.

        Raises:
            SourceError: There will be none.
        """
        if self._cancelled.is_set():
            raise cancelled_error()
        if broken.at_once:
            self._redirects += 1
            if self._redirects > self._limits.redirects:
                raise SourceProtocol(
                    "the request is sent elsewhere again and again",
                    where=self._where,
                    got=f"{self._redirects} times; at last {broken.why}",
                )
            return 0.0
        self._failures += 1
        self._attempts += 1
        waited = self._clock() - self._since
        if broken.hopeless or waited >= self._limits.patience_s:
            raise self._error(broken, waited)
        import random  # takes longer than the first request, and mostly nothing fails

        doubled = self._limits.backoff_s * 2.0 ** min(30, self._failures - 1)
        pause = random.uniform(0.0, min(self._limits.longest_backoff_s, doubled))
        left = self._limits.patience_s - waited
        if broken.after_s is not None:
            if broken.after_s > left:
                raise self._error(broken, waited)
            pause += broken.after_s
        return min(pause, left)

    def pause(self, seconds: float) -> None:
        """Waits.

        Raises:
            SourceError: The load was cancelled.
        """
        if self._cancelled.wait(seconds):
            raise cancelled_error()

    def _error(self, broken: Broken, waited: float) -> SourceUnreachable:
        status = "" if broken.status is None else f"status {broken.status}: "
        times = "1 attempt" if self._attempts == 1 else f"{self._attempts} attempts"
        got = f"{status}{broken.why}; {times} in {waited:.1f} s"
        if broken.status in (429, 503) or (broken.slow_down and broken.status is not None):
            return SourceBusy("the server has too much to do", where=self._where, got=got)
        if broken.after_s is not None and broken.after_s > self._limits.patience_s - waited:
            got += f"; it asks to come back after {broken.after_s:g} s"
        return SourceUnreachable(
            "the bytes could not be had", where=self._where, got=got, hint=_HINT
        )


_HINT = "Check the address, and the network between here and there."
