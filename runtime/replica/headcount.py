"""When there are too few workers of a role, and when too many: a policy and nothing else.

A worker is meant to have so much to do at a time, its *share*. What more there is calls for more
workers, soon: a client waits for each second of it. They go again slowly, when for a long time
fewer would have done with room to spare; so a load that swings does not start and end workers in
its rhythm.
"""

from __future__ import annotations

from collections.abc import Callable

from coldframe.runtime.replica.scale_spec import Scale

__all__ = ["RETRY_S", "UP_S", "Scaler"]

UP_S = 1.0
"""For how long there must have been too much to do, in seconds: a worker that starts takes from
those that work, and many a peak is over before it is up."""
RETRY_S = 30.0
"""For how long no more are started after one that could not be had, in seconds."""
_ROOM = 0.5
"""Fewer workers would do where each had at most this part of its share."""


class Scaler:
    """Decides how many workers of one role there should be.

    Args:
        scale: The bounds.
        share: What one worker is meant to have to do.
        down_s: For how long fewer would have done before some go, in seconds.
        clock: Monotonic seconds.
    """

    def __init__(self, scale: Scale, share: int, down_s: float, clock: Callable[[], float]) -> None:
        self.scale = scale
        self.share = share
        self._down_s = down_s
        self._clock = clock
        self._high_since: float | None = None
        self._low_since: float | None = None
        self._low_need = 0
        """The most workers that were needed since then."""
        self._not_before = 0.0

    def wanted(self, load: int, workers: int) -> int:
        """How many workers there should be from now on; to be asked about once a second.

        Args:
            load: What there is to do, in the unit of the share.
            workers: How many there are, those that still start with them.
        """
        now = self._clock()
        need = self._enough(load, self.share)
        if need > workers:
            self._low_since = None
            if self._high_since is None:
                self._high_since = now
            if now - self._high_since < UP_S or now < self._not_before:
                return workers
            self._high_since = None
            return need
        self._high_since = None
        need = self._enough(load, self.share * _ROOM)
        if need >= workers:
            self._low_since = None
            return workers
        if self._low_since is None:
            self._low_since, self._low_need = now, 0
        self._low_need = max(self._low_need, need)
        if now - self._low_since < self._down_s:
            return workers
        self._low_since = None
        return self._low_need

    def failed(self) -> None:
        """A worker that was wanted could not be had: the next one is not tried at once."""
        self._not_before = self._clock() + RETRY_S

    def _enough(self, load: int, each: float) -> int:
        """How many workers have at most so much each, within the bounds."""
        return min(self.scale.most, max(self.scale.least, -int(-load // each)))
