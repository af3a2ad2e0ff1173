"""Deaths of one replica after the other, and how long to wait before the next one is started."""

from __future__ import annotations

import time

__all__ = ["Relapses"]

_GIVE_UP = 5
"""After so many deaths a replica that never was warm is left to whoever started this container."""
_STABLE_S = 60.0
"""Who was warm for so long dies for a reason of its own: the deaths before it count no more."""
_LOOP = 3
"""So many deaths, one after the other, are a loop: nobody is sent here meanwhile."""
_FIRST_DELAY_S = 0.5
_MOST_DELAY_S = 60.0


class Relapses:
    """Counts deaths that follow one another soon."""

    def __init__(self) -> None:
        self.count = 0
        self._retry_at = 0.0
        self._warm_since: float | None = None

    @property
    def wait_s(self) -> float:
        """How long the next start is to be put off, in seconds."""
        return max(0.0, self._retry_at - time.monotonic())

    @property
    def looping(self) -> bool:
        return self.count >= _LOOP

    @property
    def too_many(self) -> bool:
        """Whether one that never was warm is given up."""
        return self.count >= _GIVE_UP

    def warm(self) -> None:
        """It is warm from now on."""
        self._warm_since = time.monotonic()

    def died(self) -> None:
        """One more."""
        moment = time.monotonic()
        if self._warm_since is not None and moment - self._warm_since > _STABLE_S:
            self.count = 0
        self._warm_since = None  # those who die before they are warm again do follow one another
        self.count += 1
        # The first time at once: a single death is none of a loop.
        delay = 0.0 if self.count == 1 else _FIRST_DELAY_S * 2 ** (self.count - 2)
        self._retry_at = moment + min(delay, _MOST_DELAY_S)

    def forget(self) -> None:
        """It went to rest by itself."""
        self.count = 0
