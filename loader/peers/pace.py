"""Whether a peer still gives what it could: else there may be a better one.

Nothing for a while is suspicious where the peer has what we lack. Where it has not, it waits for a
source of its own, and finds another one sooner than we would; so it is given more time. A trickle
is one where the peer has had more than we could take all the while, and gave a tenth of what it
had given before.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

__all__ = ["Pace"]

_STILL_S = 20.0
_WAITING_S = 60.0
_WINDOW_S = 15.0
_TRICKLE = 0.1
_LEAST_RATE = 1 << 20
"""A peer that never gave this much in a second is not told by its pace."""


class _Seen(NamedTuple):
    at: float
    ours: int
    ahead: bool


class Pace:
    """One peer's, as it is looked at now and then.

    Args:
        still_s: For how long nothing may come of what the peer has.
        waiting_s: And where it has no more than we have.
        window_s: Over which a rate is taken.
    """

    def __init__(
        self,
        still_s: float = _STILL_S,
        waiting_s: float = _WAITING_S,
        window_s: float = _WINDOW_S,
    ) -> None:
        self._still_s = still_s
        self._waiting_s = waiting_s
        self._window_s = window_s
        self._seen: deque[_Seen] = deque()
        self._moved: tuple[float, int] | None = None
        self._best = 0.0

    def look(self, now: float, ours: int, theirs: int | None) -> str | None:
        """Takes note of how far both are.

        Args:
            now: Monotonic seconds.
            ours: Bytes that are in here.
            theirs: Bytes that the peer has; None where it did not say.

        Returns:
            Why it should be given up, or None.
        """
        ahead = theirs is None or theirs > ours
        if self._moved is None or ours > self._moved[1]:
            self._moved = (now, ours)
        still = now - self._moved[0]
        if still >= (self._still_s if ahead else self._waiting_s):
            return f"the peer gave nothing for {still:.0f} s"
        self._seen.append(_Seen(now, ours, ahead))
        while len(self._seen) > 1 and now - self._seen[1].at >= self._window_s:
            self._seen.popleft()
        first = self._seen[0]
        elapsed = now - first.at
        if elapsed < self._window_s:
            return None
        rate = (ours - first.ours) / elapsed
        self._best = max(self._best, rate)
        full = all(seen.ahead for seen in self._seen)
        if full and self._best >= _LEAST_RATE and rate < _TRICKLE * self._best:
            return f"the peer gives {rate / 1e6:.1f} MB/s, and gave {self._best / 1e6:.1f} before"
        return None
