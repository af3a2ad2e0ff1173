"""How long devices may be held while nobody asks: so many seconds in each hour, of all models.

A leaky bucket: it holds one hour's seconds, fills with time, and who is held for nobody drains it.
Whoever is being asked costs it nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from coldframe.loader.awake import AwakeClock

__all__ = ["Budget"]

_HOUR_S = 3600.0


class Budget:
    """Device seconds that are left to be held for nobody.

    Args:
        per_hour: How many there are in an hour.
        clock: Monotonic seconds.
        left: How many there are at first; by default as many as in an hour.
    """

    def __init__(
        self,
        per_hour: float,
        clock: Callable[[], float] | None = None,
        left: float | None = None,
    ) -> None:
        self.left = per_hour if left is None else left
        self._per_hour = per_hour
        self._held = 0
        # A process that its platform has stopped is not held.
        self._clock = clock or AwakeClock()
        self._at_s = self._clock()

    def hold(self, devices: int) -> None:
        """So many devices are held for nobody from now on; those until now have cost what they
        did."""
        moment = self._clock()
        passed_s, self._at_s = moment - self._at_s, moment
        filled = self.left - passed_s * self._drain
        self.left = min(self._per_hour, max(0.0, filled))
        self._held = devices

    def wait_s(self, seconds: float) -> float:
        """In how long there is less left than so many seconds; infinite where it is never."""
        return max(0.0, self.left - seconds) / self._drain if self._drain > 0 else math.inf

    @property
    def _drain(self) -> float:
        """How much there is less in a second."""
        return self._held - self._per_hour / _HOUR_S
