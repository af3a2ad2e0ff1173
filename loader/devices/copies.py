"""What goes where: a chunk of an extent as copies from a host's buffer to a device's memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from coldframe.loader.checkpoints.extents import Extent, Run

__all__ = ["Copy", "copies_of"]


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes, or rows of them, on their way to a device.

    Attributes:
        place: Where the first byte goes, counted from the transfer's base. Rows lie behind one
            another there.
        offset: Where it is in the buffer.
        length: Bytes, of one row.
        count: Rows.
        stride: From row to row in the buffer, in bytes; nothing for a single one.
    """

    place: int
    offset: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def end(self) -> int:
        """The offset behind the last byte in the buffer."""
        return self.offset + (self.count - 1) * self.stride + self.length


def copies_of(extent: Extent, start: int, stop: int, lead: int = 0) -> Iterator[Copy]:
    """The copies that bring consecutive bytes of an extent to their places.

    Args:
        extent: The extent.
        start: The first byte's offset in the file.
        stop: The offset behind the last.
        lead: Where the first byte is in the buffer.
    """
    at, end = start - extent.file_offset, stop - extent.file_offset
    for run in extent.runs:
        if run.offset >= end:
            break
        for offset, place, length, count in _whole_rows(run, at, end):
            stride = run.stride if count > 1 else 0
            yield Copy(place, lead + offset - at, length, count, stride)


def _whole_rows(run: Run, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """What of a run lies between two offsets: a cut row, whole ones together, a cut row.

    Yields:
        Offset in the extent, place in the arena, bytes of a row, rows.
    """
    stride = run.stride or run.length
    # Rows that end before the data begins are skipped at once, not one by one.
    row = max(0, (at - run.offset - run.length) // stride + 1)
    while row < run.count and run.offset + row * stride < end:
        begin = run.offset + row * stride
        place = run.arena_offset + row * run.length
        low, high = max(begin, at), min(begin + run.length, end)
        whole = 0
        if high - low == run.length:
            whole = min(run.count - row, (end - begin - run.length) // stride + 1)
        yield low, place + low - begin, high - low, max(1, whole)
        row += max(1, whole)
