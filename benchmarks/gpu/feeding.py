"""A ring fed for a benchmark: all that these benchmarks use of the way into a GPU's memory.

As in a load, readers fetch chunks in the order of use; it is over when the last one has arrived.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from coldframe.benchmarks.gpu.bare import host_buffer, move
from coldframe.loader.checkpoints.plan import Extent, Plan
from coldframe.loader.devices.buffers import Buffer
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_placer import DevicePlacer, buffer_bytes
from coldframe.loader.devices.ring import Ring
from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.direct import BLOCK

__all__ = ["ConnectedRing", "Feed", "MemorySource", "load", "pieces", "read_alone"]

_SPARE = 4
_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Feed:
    """One way to feed a ring.

    Args:
        chunk: Bytes that are read at once.
        readers: Threads that read.
        streams: Queues that copies alternate between.
    """

    chunk: int
    readers: int
    streams: int

    def __str__(self) -> str:
        streams = "one stream" if self.streams == 1 else f"{self.streams} streams"
        return f"{self.readers} readers, {self.chunk / (1 << 20):g} MiB, {streams}"


class MemorySource:
    """Host memory in the place of files: a source without a disk or a page cache.

    Args:
        buffer: Read over and over.
    """

    readers = None
    chunk = None
    note = "host RAM"
    verified = None

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._size = len(buffer.view)

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        at = offset % self._size
        for part in parts:
            done = 0
            while done < len(part):
                step = min(len(part) - done, self._size - at)
                move(_address(part) + done, self._buffer.address + at, step)
                done, at = done + step, (at + step) % self._size

    def finish(self) -> None:
        return

    def abort(self) -> None:
        return

    def close(self) -> None:
        return


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def pieces(plan: Plan, chunk: int, most: int) -> Iterator[tuple[Extent, int, int]]:
    """A plan's bytes in chunks, in the order of use, up to so many: extent, first, end offset."""
    left = most
    for stage in plan.stages:
        for extent in stage.extents:
            start, end = extent.file_offset, extent.file_offset + extent.length
            while start < end and left > 0:
                stop = min(end, (start // chunk + 1) * chunk, start + left)
                yield extent, start, stop
                left -= stop - start
                start = stop


def load(ring: Ring, source: Source, plan: Plan, address: int, feed: Feed, most: int) -> float:
    """Brings a plan's first bytes to the device: bytes per second.

    Args:
        ring: Connected.
        source: Where they come from.
        plan: What goes where.
        address: The arena's.
        feed: How; the ring's streams were chosen when it was connected.
        most: How many bytes.

    Raises:
        ColdframeError: They did not arrive.
    """
    todo = list(pieces(plan, feed.chunk, most))
    total = sum(stop - start for _, start, stop in todo)
    transfer = ring.transfer()
    transfer.base = address
    placer = DevicePlacer(source, transfer)
    queue, lock = iter(todo), threading.Lock()
    left, all_in = len(todo), threading.Event()
    errors: list[ColdframeError] = []

    def arrived(error: ColdframeError | None) -> None:
        nonlocal left
        with lock:
            left -= 1
            if error is not None:
                errors.append(error)
            if left == 0 or error is not None:
                all_in.set()

    def read() -> None:
        while True:
            with lock:
                piece = None if errors else next(queue, None)
            if piece is None:
                return
            placer.fetch(*piece, arrived)

    started = time.perf_counter()
    with ThreadPoolExecutor(feed.readers) as pool:
        for future in [pool.submit(read) for _ in range(feed.readers)]:
            future.result()
    if not all_in.wait(_WAIT_S):
        raise PlatformError("copies to the device do not arrive", got=f"{left} are missing")
    if errors:
        raise errors[0]
    return total / (time.perf_counter() - started)


class ConnectedRing:
    """A ring for a feed, connected, as a context manager."""

    def __init__(self, feed: Feed, context: Context) -> None:
        self._ring = Ring(feed.readers + _SPARE, buffer_bytes(feed.chunk))
        try:
            self._ring.connect(context, streams=feed.streams)
        except BaseException:
            self._ring.close()
            raise

    def __enter__(self) -> Ring:
        return self._ring

    def __exit__(self, *_: object) -> None:
        self._ring.close()


def read_alone(source: Source, plan: Plan, feed: Feed, most: int) -> float:
    """The same reads by as many threads, into buffers that nobody copies: bytes per second."""
    todo = list(pieces(plan, feed.chunk, most))
    queue, lock = iter(todo), threading.Lock()

    def read() -> None:
        view = host_buffer(buffer_bytes(feed.chunk)).view
        while True:
            with lock:
                piece = next(queue, None)
            if piece is None:
                return
            extent, start, stop = piece
            lead = start % BLOCK
            source.read_into(extent.shard, start, [view[lead : lead + stop - start]])

    started = time.perf_counter()
    with ThreadPoolExecutor(feed.readers) as pool:
        for future in [pool.submit(read) for _ in range(feed.readers)]:
            future.result()
    return sum(stop - start for _, start, stop in todo) / (time.perf_counter() - started)
