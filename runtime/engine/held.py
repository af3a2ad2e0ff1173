"""The captured steps of one process, and which of them are replayed."""

from __future__ import annotations

from collections.abc import Set

from coldframe.runtime.engine.buckets import Bucket
from coldframe.runtime.engine.capture import Captured, Replay

__all__ = ["HeldSteps"]


class HeldSteps:
    """A step for each of some buckets.

    Attributes:
        captured: Those that were captured here.
        rebuilt: Those that were captured elsewhere.
        trusted: Whose replays were found to be right.
        dropped: Whether captured ones were given up once. What is captured behind that lies
            otherwise in memory than in a process that has captured the same.
    """

    def __init__(self) -> None:
        self.captured: dict[Bucket, Captured] = {}
        self.rebuilt: dict[Bucket, Replay] = {}
        self.trusted: set[Bucket] = set()
        self.dropped = False
        self._aside: list[Captured] = []
        """Torch clears the libraries' workspaces when a graph is reset, and what is captured
        behind that has others. So what is not replayed is kept until all of them are dropped."""

    @property
    def buckets(self) -> Set[Bucket]:
        """Those that need no capture."""
        return self.captured.keys() | self.rebuilt.keys()

    def get(self, bucket: Bucket) -> Replay | None:
        """What is replayed for a bucket."""
        return self.rebuilt.get(bucket) or self.captured.get(bucket)

    def set_aside(self, bucket: Bucket) -> None:
        """Has a bucket's step not be replayed any more; it may not be under way."""
        if (rebuilt := self.rebuilt.pop(bucket, None)) is not None:
            rebuilt.close()
        if (captured := self.captured.pop(bucket, None)) is not None:
            self._aside.append(captured)

    def drop(self) -> None:
        """Gives all of them up; none may be under way."""
        every: list[Replay] = [*self.rebuilt.values(), *self.captured.values(), *self._aside]
        self.dropped = self.dropped or bool(self.captured or self._aside)
        self.captured.clear()
        self.rebuilt.clear()
        self.trusted.clear()
        self._aside.clear()
        for step in every:
            step.close()
