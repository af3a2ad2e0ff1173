"""The stream: a plan's bytes into the arena, stage by stage, by several threads.

Each thread takes the next chunk in the order of use, so the bytes in flight are bounded, and the
first stages are complete first. A chunk is in when whoever fetches it says so: at once where it is
read straight to where it belongs, later where a copy to a device follows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from coldframe.loader.checkpoints.plan import Extent, Plan
from coldframe.loader.devices.base import Arrived
from coldframe.loader.errors import ColdframeError, SourceError
from coldframe.loader.memory_service.board import Board, StageState
from coldframe.loader.throttle import Throttle
from coldframe.loader.timeline import Recorder, now

__all__ = ["CHUNK", "Fetch", "Stream", "pieces_of"]

CHUNK = 8 << 20
"""Bytes that a reader asks for at once, where the source does not say."""
_FIRST_CHUNK = 1 << 20
_MIN_CHUNK = 64 << 10
_LARGEST = 1 << 30  # beyond that nothing is read, and nobody waits for what others read
_THROTTLED_CHUNK_S = 0.005

Fetch = Callable[[Extent, int, int, Arrived], None]
"""Brings the bytes of an extent between two offsets of its file to their places; see `Landing`."""


class _Chunk(NamedTuple):
    extent: Extent
    start: int
    stop: int


class Stream:
    """Fills an arena, as planned.

    Args:
        plan: Stages and extents.
        fetch: Brings bytes where they belong. Called by several threads.
        board: Where progress is shown.
        finish: Called when all bytes are in and before the last stage is given out: raises where
            they do not belong together.
        abort: Called when a chunk has failed: ends the waiting of the readers.
        stop: Called by `cancel`: when it returns nobody is told of a chunk any more, but for those
            who are in a `fetch`.
        on_chunk: Called with an extent and the offsets in its file between which bytes of it are
            in, before its stage may be complete; from any thread. The last comes after `finish`.
        on_stage: Called with a stage's index once its bytes are in; from any thread.
        on_end: Called once at the end, with the error that ended it early or None; not after
            `cancel`.
        threads: Readers.
        chunk: Bytes that one of them asks for at once, a power of two, or None. The first chunks
            are smaller: what all readers have asked for beyond a stage keeps that stage waiting.
        smallest: Bytes that a chunk should have at least, also where a throttle makes them small.
        name: The span that stands for all of it.
        note: Says at the end how the bytes came, for the timeline.
        throttle: A limit on the rate, or None.
    """

    def __init__(
        self,
        plan: Plan,
        fetch: Fetch,
        board: Board,
        *,
        finish: Callable[[], None],
        abort: Callable[[], None] = lambda: None,
        stop: Callable[[], None] = lambda: None,
        on_chunk: Callable[[Extent, int, int], None] | None = None,
        on_stage: Callable[[int], None],
        on_end: Callable[[ColdframeError | None], None],
        recorder: Recorder,
        threads: int,
        chunk: int | None = None,
        smallest: int = 0,
        name: str = "weight_read",
        note: Callable[[], str] | None = None,
        throttle: Throttle | None = None,
    ) -> None:
        self._fetch = fetch
        self._board = board
        self._finish = finish
        self._abort = abort
        self._stop = stop
        self._on_chunk = on_chunk
        self._on_stage = on_stage
        self._on_end = on_end
        self._recorder = recorder
        self._throttle = throttle
        self._note = note
        self._name = name
        chunk = chunk or CHUNK
        first = min(chunk, _FIRST_CHUNK) if chunk <= _LARGEST else chunk
        if throttle is not None:
            # A power of two, as all chunks are, so that they are whole blocks and whole pieces.
            some = 1 << max(1, int(throttle.rate * _THROTTLED_CHUNK_S)).bit_length() - 1
            chunk = first = min(chunk, max(_MIN_CHUNK, smallest, some))
        self._chunks = _chunks(plan, first, chunk)
        self._left = [stage.nbytes for stage in plan.stages]
        self._lock = threading.Lock()
        self._error: ColdframeError | None = None
        self._cancelled = threading.Event()
        self._most_readers = threads
        self._readers = 0
        self._under_way = 0
        """Chunks that are not in yet."""
        self._threads: list[threading.Thread] = []
        self._ended = False
        self._started_ns = 0

    def start(self) -> None:
        self._started_ns = now()
        for stage, left in enumerate(self._left):
            if left == 0:
                self._ready(stage)
        self._start_reader()

    def _start_reader(self) -> None:
        """One more, if it may be.

        Each starts the next when it has something to read: many at once would only be in each
        other's way, while the first bytes wait.
        """
        with self._lock:
            if len(self._threads) == self._most_readers or self._cancelled.is_set():
                return
            name = f"read-{len(self._threads)}"
            thread = threading.Thread(target=self._read, name=name, daemon=True)
            thread.start()  # or it is not counted
            self._threads.append(thread)
            self._readers += 1

    def cancel(self) -> None:
        """Ends it early and waits until no thread touches the arena any more."""
        with self._lock:  # no reader is started any more
            self._cancelled.set()
        self._stop()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        first = True
        try:
            while not self._cancelled.is_set():
                with self._lock:
                    chunk = next(self._chunks, None)
                if chunk is None:
                    break
                if first:
                    self._start_reader()
                    first = False
                self._fetch_chunk(chunk)
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            self._fail(error)
        with self._lock:
            self._readers -= 1
        self._maybe_end()

    def _fetch_chunk(self, chunk: _Chunk) -> None:
        length = chunk.stop - chunk.start
        due = None if self._throttle is None else self._throttle.book(length)
        with self._lock:
            self._under_way += 1
        try:
            arrived = partial(self._arrived, chunk, due)
            self._fetch(chunk.extent, chunk.start, chunk.stop, arrived)
        except BaseException:
            with self._lock:
                self._under_way -= 1
            raise

    def _arrived(self, chunk: _Chunk, due: float | None, error: ColdframeError | None) -> None:
        try:
            if error is not None:
                raise error
            if due is None or not self._cancelled.wait(max(0.0, due - time.monotonic())):
                self._count(chunk)
        except Exception as failure:  # noqa: BLE001 - this may be another's thread
            self._fail(failure)
        with self._lock:
            self._under_way -= 1
        self._maybe_end()

    def _count(self, chunk: _Chunk) -> None:
        stage, length = chunk.extent.stage, chunk.stop - chunk.start
        self._board.advance(stage, length)
        with self._lock:
            self._left[stage] -= length
            complete = self._left[stage] == 0
            last = complete and not any(self._left)
        if last:
            # Before the last stage is given out: a file that was replaced meanwhile may have
            # given old bytes to some stages and new ones to others.
            self._finish()
        if self._on_chunk is not None:
            self._on_chunk(chunk.extent, chunk.start, chunk.stop)
        if complete:
            self._ready(stage)

    def _maybe_end(self) -> None:
        """Says that it is over, where nobody reads any more and nothing is on its way."""
        with self._lock:
            over = not self._ended and not self._readers and not self._under_way
            self._ended = self._ended or over
            cancelled = self._error is None and any(self._left)
        if over and not cancelled:
            self._recorder.add(self._name, self._started_ns, note=self._note and self._note())
            self._on_end(self._error)

    def _ready(self, stage: int) -> None:
        with self._lock:
            if self._board.state(stage) is StageState.FAILED:
                return  # the load was given up meanwhile: nobody waits for it any more
            self._board.settle(stage, StageState.READY)
        self._recorder.add(f"stage_ready[{stage}]", now())
        self._on_stage(stage)

    def _fail(self, cause: Exception) -> None:
        error = cause
        if not isinstance(error, ColdframeError):
            error = SourceError("the stream broke", got=repr(cause))
        with self._lock:
            if self._error is None:
                if self._cancelled.is_set():
                    return  # it is what `cancel` has led to
                self._error = error
            self._cancelled.set()
        self._abort()
        with self._lock:
            for stage in range(len(self._left)):
                if self._board.state(stage) is StageState.PENDING:
                    self._board.settle(stage, StageState.FAILED)


def pieces_of(plan: Plan) -> Iterator[tuple[Extent, int, int]]:
    """All of a plan in pieces to fetch one after the other: extent, first offset, end offset."""
    return iter(_chunks(plan, CHUNK, CHUNK))


def _chunks(plan: Plan, first: int, size: int) -> Iterator[_Chunk]:
    """Cuts the extents where the file's offset is a multiple of the size: at whole blocks."""
    small = plan.stages[0].nbytes + (plan.stages[1].nbytes if len(plan.stages) > 1 else 0)
    done = 0
    for stage in plan.stages:
        for extent in stage.extents:
            start, end = extent.file_offset, extent.file_offset + extent.length
            while start < end:
                step = first if done < small else size
                stop = min(end, (start // step + 1) * step)
                yield _Chunk(extent, start, stop)
                done += stop - start
                start = stop
