"""A clock that stands still while this process does.

Who waits for another process's word must not count the time in which it could not have heard it:
a virtual machine is suspended, a platform takes the processor away between two requests, somebody
stops the whole group. The other side was stopped as well then, and gets its time behind that. No
clock of the kernel's knows of all these. So this one is looked at often, and a gap between two
looks counts as a short one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["AwakeClock"]

_MOST_S = 2.0


class AwakeClock:
    """Seconds in which this process ran, as far as it has looked.

    Call it at least once a second where it is to keep time: it never goes faster than the time
    does, and slower for who looks seldom. For one thread.

    Args:
        clock: Monotonic seconds.
        most_s: What a gap counts at most.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, most_s: float = _MOST_S
    ) -> None:
        self._clock = clock
        self._most_s = most_s
        self._looked_at = clock()
        self._ran_s = 0.0

    def __call__(self) -> float:
        moment = self._clock()
        self._ran_s += min(moment - self._looked_at, self._most_s)
        self._looked_at = moment
        return self._ran_s
