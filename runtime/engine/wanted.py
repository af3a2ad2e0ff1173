"""Which decode steps are to be captured, which of them is next, and why some never are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence

from coldframe.loader.errors import DeviceError
from coldframe.runtime.engine.buckets import Bucket

__all__ = ["Wanted"]

_USES = 2
"""How often a bucket comes before it is captured: most that come twice go on coming."""
_FAILURES = 3
"""Failed captures in a row behind which no other is tried."""


class Wanted:
    """The buckets whose steps are worth a capture.

    Args:
        buckets: All of them, the smallest first.

    Attributes:
        refused: Why steps are not captured, or are not replayed though they are.
        closed: Why none is captured any more.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.refused: dict[Bucket, DeviceError] = {}
        self.closed: DeviceError | None = None
        self._left = dict.fromkeys(buckets)
        self._uses: Counter[Bucket] = Counter()
        self._failures = 0

    def __contains__(self, bucket: object) -> bool:
        return bucket in self._left

    def use(self, bucket: Bucket) -> bool:
        """Counts a step. Whether its bucket has come often enough to be captured."""
        self._uses[bucket] += 1
        return self._uses[bucket] >= _USES and self._failures < _FAILURES

    def missing(self, there: Container[Bucket]) -> list[Bucket]:
        """Those that are to be captured yet: first those that have come, then the smallest.

        Args:
            there: Those that are captured.
        """
        if self._failures >= _FAILURES:
            return []
        left = [bucket for bucket in self._left if bucket not in there]
        return sorted(left, key=lambda bucket: not self._uses[bucket])

    def succeeded(self) -> None:
        """A step was captured."""
        self._failures = 0

    def refuse(self, bucket: Bucket, why: DeviceError) -> None:
        """A step could not be captured, and is not tried again."""
        self._failures += 1
        self.leave(bucket, why)

    def leave(self, bucket: Bucket, why: DeviceError) -> None:
        """A step is not worth a capture, which says nothing of the others."""
        self.refused[bucket] = why
        self._left.pop(bucket, None)

    def close(self, why: DeviceError) -> None:
        """No step is to be captured any more."""
        self.closed = why
        self.refused |= dict.fromkeys(self._left, why)
        self._left.clear()
