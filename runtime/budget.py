"""How long devices may be held while nobody asks: so many seconds in each hour, of all models.

A leaky bucket: it holds one hour's seconds, fills with time, and who is held for nobody drains it.
Whoever is being asked costs it nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from coldframe.loader.awake import AwakeClock

__all__ = ["Budget"]

_HOUR_S = 3600.0


class Budget:
    """Device seconds that are left to be held for nobody.

    Args:
        per_hour: How many there are in an hour.
        clock: Monotonic seconds.
    """

    def __init__(self, per_hour: float, clock: Callable[[], float] | None = None) -> None:
        self.left = per_hour
        self._per_hour = per_hour
        # A process that its platform has stopped is not held.
        self._clock = clock or AwakeClock()
        self._at_s = self._clock()

    def spend(self, devices: int) -> None:
        """So many devices have been held for nobody since this was called last."""
        moment = self._clock()
        passed_s, self._at_s = moment - self._at_s, moment
        filled = self.left + passed_s * (self._per_hour / _HOUR_S - devices)
        self.left = min(self._per_hour, max(0.0, filled))
