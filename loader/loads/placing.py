"""Bytes from a source to their places in the arena.

Most of what is read goes straight to where it belongs. What is cut into rows on the way - a slice
by columns - passes through a buffer of the reading thread's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from coldframe.loader.checkpoints.plan import Extent
from coldframe.loader.sources.base import Source

__all__ = ["Placer", "parts_of", "scatter"]

Discard = Callable[[int], memoryview]


class Placer:
    """Fills the arena from a source, for several threads.

    Args:
        source: Where the bytes come from.
        memory: The arena's bytes.
        fault_in: Has memory found for so many bytes at an offset of the arena. Done in one call
            ahead of a read, it costs less than a fault for each small page within.
    """

    def __init__(
        self,
        source: Source,
        memory: memoryview,
        fault_in: Callable[[int, int], object] = lambda offset, length: None,
    ) -> None:
        self._source = source
        self._memory = memory
        self._fault_in = fault_in
        self._scratch = threading.local()

    def fetch(self, extent: Extent, start: int, stop: int) -> None:
        """Brings bytes of an extent to their places.

        Args:
            extent: The extent.
            start: The first byte's offset in the file.
            stop: The offset behind the last.

        Raises:
            SourceError: They could not be had.
        """
        if all(run.count == 1 for run in extent.runs):
            discarded = 0

            def discard(length: int) -> memoryview:
                # Each its own memory, so that who checks the bytes finds them all.
                nonlocal discarded
                discarded += length
                return self._buffer(discarded)[discarded - length :]

            for offset, length in places_of(extent, start, stop):
                self._fault_in(offset, length)
            parts = parts_of(extent, start, stop, self._memory, discard)
            self._source.read_into(extent.shard, start, parts)
        else:
            buffer = self._buffer(stop - start)
            self._source.read_into(extent.shard, start, [buffer])
            scatter(extent, start, buffer, self._memory)

    def _buffer(self, length: int) -> memoryview:
        """Memory of the calling thread, for bytes that go nowhere or go on from there."""
        buffer: memoryview | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < length:
            buffer = self._scratch.buffer = memoryview(bytearray(length))
        return buffer[:length]


def places_of(extent: Extent, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Where consecutive bytes of an extent without strided runs go: arena offsets and lengths."""
    at, end = start - extent.file_offset, stop - extent.file_offset
    for run in extent.runs:
        low, high = max(at, run.offset), min(end, run.offset + run.length)
        if low < high:
            yield low - run.offset + run.arena_offset, high - low


def parts_of(
    extent: Extent, start: int, stop: int, memory: memoryview, discard: Discard
) -> list[memoryview]:
    """The places of consecutive bytes of an extent without strided runs, one after the other.

    Args:
        extent: The extent.
        start: The first byte's offset in the file.
        stop: The offset behind the last.
        memory: The arena's bytes.
        discard: Gives a buffer of a length, for bytes that go nowhere.
    """
    parts: list[memoryview] = []
    at, end = start - extent.file_offset, stop - extent.file_offset
    for run in extent.runs:
        if run.offset + run.length <= at:
            continue
        if run.offset >= end:
            break
        if run.offset > at:
            parts.append(discard(run.offset - at))
            at = run.offset
        until = min(end, run.offset + run.length)
        shift = run.arena_offset - run.offset
        parts.append(memory[at + shift : until + shift])
        at = until
    if at < end:
        parts.append(discard(end - at))
    return parts


def scatter(extent: Extent, start: int, data: memoryview, memory: memoryview) -> None:
    """Copies consecutive bytes of an extent to their places.

    Args:
        extent: The extent.
        start: The first byte's offset in the file.
        data: The bytes.
        memory: The arena's bytes.
    """
    at = start - extent.file_offset
    end = at + len(data)
    for run in extent.runs:
        stride = run.stride or run.length
        # Rows that end before the data begins are skipped at once, not one by one.
        first = max(0, (at - run.offset - run.length) // stride + 1)
        for row in range(first, run.count):
            begin = run.offset + row * stride
            if begin >= end:
                break
            low, high = max(begin, at), min(begin + run.length, end)
            place = run.arena_offset + row * run.length + low - begin
            memory[place : place + high - low] = data[low - at : high - at]
