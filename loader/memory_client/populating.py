"""Weights' pages entered into a worker's page table before it computes with them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from coldframe.loader.checkpoints.plan import Stage
from coldframe.loader.devices.base import Mapping

__all__ = ["Populator", "ranges_of"]

Range = tuple[int, int]
"""Offset and length of bytes of the arena."""


class Populator:
    """A thread that spares whoever computes with a stage the page faults.

    A stage is ready when it is in and entered here: who touches pages while they are entered is in
    the way, and takes longer for both.

    Args:
        weights: Says where they are mapped now.
        done: Told by the thread of the stages that are entered.
    """

    def __init__(
        self, weights: Callable[[], Mapping | None], done: Callable[[Sequence[int]], None]
    ) -> None:
        self._weights = weights
        self._done = done
        self._work: queue.SimpleQueue[tuple[Sequence[int], Sequence[Range]] | None]
        self._work = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="populate", daemon=True)
        self._thread.start()

    def enter(self, stages: Sequence[int], ranges: Sequence[Range]) -> None:
        """Has stretches of the arena entered, which are all that some stages lack."""
        self._work.put((stages, ranges))

    def close(self) -> None:
        """Waits for what is under way."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            stages, ranges = work
            weights = self._weights()
            if weights is not None:
                for offset, length in ranges:
                    weights.populate(offset, length)
            self._done(stages)


def ranges_of(stage: Stage) -> list[Range]:
    """Where a stage's bytes are in the arena."""
    return [
        (run.arena_offset, run.length * run.count)
        for extent in stage.extents
        for run in extent.runs
    ]
