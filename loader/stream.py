"""The stream: a plan's bytes into the arena, stage by stage, by several threads.

Each thread takes the next chunk in the order of use, so the bytes in flight are bounded by
threads x chunk, and the first stages are complete first. Chunks are read straight to where they
belong; nothing is copied on the way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from coldframe.loader.board import Board, StageState
from coldframe.loader.errors import ColdframeError, SourceError
from coldframe.loader.plan import Plan
from coldframe.loader.sources.base import Source
from coldframe.loader.timeline import Recorder, now

__all__ = ["Stream", "Throttle"]

_CHUNK = 8 << 20
_MIN_CHUNK = 64 << 10
_THROTTLED_CHUNK_S = 0.005


class Throttle:
    """Makes a source as slow as a link of the given rate: a byte is there when it could be.

    Args:
        rate: Bytes per second.
    """

    # What a link may catch up after a hiccup of the reader: its buffers hold some milliseconds.
    _SLACK_S = 0.02

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._arrives: float | None = None
        self._lock = threading.Lock()

    def book(self, nbytes: int) -> float:
        """Reserves the link for so many bytes; returns when they have passed (monotonic s)."""
        with self._lock:
            earliest = time.monotonic()
            if self._arrives is not None:
                earliest = max(self._arrives, earliest - self._SLACK_S)
            self._arrives = earliest + nbytes / self.rate
            return self._arrives


class _Chunk(NamedTuple):
    stage: int
    shard: int
    file_offset: int
    arena_offset: int
    length: int


class Stream:
    """Fills an arena from a source, as planned.

    Args:
        plan: Stages and extents.
        source: Where the bytes are read.
        memory: The arena's bytes; None where the files themselves are mapped there, and their
            pages only have to be brought into the page cache.
        board: Where progress is shown.
        on_stage: Called with a stage's index once its bytes are in; from a reader's thread.
        on_end: Called once at the end, with the error that ended it early or None; not after
            `cancel`.
        threads: Readers.
        note: How the bytes come, for the timeline.
        throttle: A limit on the rate, or None.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        memory: memoryview | None,
        board: Board,
        *,
        on_stage: Callable[[int], None],
        on_end: Callable[[ColdframeError | None], None],
        recorder: Recorder,
        threads: int = 2,
        note: str | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        self._plan = plan
        self._source = source
        self._memory = memory
        self._board = board
        self._on_stage = on_stage
        self._on_end = on_end
        self._recorder = recorder
        self._throttle = throttle
        self._note = note
        size = _CHUNK
        if throttle is not None:
            size = min(_CHUNK, max(_MIN_CHUNK, int(throttle.rate * _THROTTLED_CHUNK_S)))
        self._chunks = _chunks(plan, size)
        self._left = [stage.nbytes for stage in plan.stages]
        self._lock = threading.Lock()
        self._error: ColdframeError | None = None
        self._cancelled = threading.Event()
        self._readers = threads
        self._threads = [
            threading.Thread(target=self._read, name=f"read-{n}", daemon=True)
            for n in range(threads)
        ]
        self._started_ns = 0

    def start(self) -> None:
        self._started_ns = now()
        for stage, left in enumerate(self._left):
            if left == 0:
                self._ready(stage)
        for thread in self._threads:
            thread.start()

    def cancel(self) -> None:
        """Ends it early and waits until no thread touches the arena any more."""
        self._cancelled.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _read(self) -> None:
        try:
            while not self._cancelled.is_set():
                with self._lock:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._read_chunk(chunk)
        except ColdframeError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            self._fail(SourceError("the stream broke", got=repr(error)))
        with self._lock:
            self._readers -= 1
            last = self._readers == 0
            cancelled = self._error is None and any(self._left)
        if last and not cancelled:
            self._recorder.add("weight_read", self._started_ns, note=self._note)
            self._on_end(self._error)

    def _read_chunk(self, chunk: _Chunk) -> None:
        arrives = None if self._throttle is None else self._throttle.book(chunk.length)
        if self._memory is None:
            self._source.make_resident(chunk.shard, chunk.file_offset, chunk.length)
        else:
            place = self._memory[chunk.arena_offset : chunk.arena_offset + chunk.length]
            self._source.read_into(chunk.shard, chunk.file_offset, place)
        if arrives is not None and self._cancelled.wait(max(0.0, arrives - time.monotonic())):
            return
        self._board.advance(chunk.stage, chunk.length)
        with self._lock:
            self._left[chunk.stage] -= chunk.length
            complete = self._left[chunk.stage] == 0
            last = complete and not any(self._left)
        if last:
            # Before the last stage is given out: a file that was replaced meanwhile may have
            # given old bytes to some stages and new ones to others.
            self._source.check_unchanged()
        if complete:
            self._ready(chunk.stage)

    def _ready(self, stage: int) -> None:
        self._board.settle(stage, StageState.READY)
        self._recorder.add(f"stage_ready[{stage}]", now())
        self._on_stage(stage)

    def _fail(self, error: ColdframeError) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._cancelled.set()
        for stage in range(len(self._left)):
            if self._board.state(stage) is StageState.PENDING:
                self._board.settle(stage, StageState.FAILED)


def _chunks(plan: Plan, size: int) -> Iterator[_Chunk]:
    """Cuts the extents where the file's offset is a multiple of the size: at whole blocks."""
    for stage in plan.stages:
        for extent in stage.extents:
            shift = extent.arena_offset - extent.file_offset
            start, end = extent.file_offset, extent.file_offset + extent.length
            while start < end:
                stop = min(end, (start // size + 1) * size)
                yield _Chunk(stage.index, extent.shard, start, start + shift, stop - start)
                start = stop
