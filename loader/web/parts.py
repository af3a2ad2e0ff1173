"""Several buffers in a row that are filled as if they were one."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Parts"]

_MOST_BUFFERS = 1024  # IOV_MAX


class Parts:
    """What is still empty of some buffers. For one thread; `left` may be read by others.

    Args:
        buffers: Writable bytes, filled one after the other.

    Attributes:
        left: Bytes that are still to come.
    """

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = [buffer for buffer in buffers if buffer.nbytes]
        self._index = 0
        self._filled = 0  # of the buffer at the index
        self.left = sum(buffer.nbytes for buffer in self._buffers)

    def next(self, most: int) -> list[memoryview]:
        """Where the next bytes belong: at most `most` of them, none only where none is left."""
        found: list[memoryview] = []
        start = self._filled
        for index in range(self._index, min(self._index + _MOST_BUFFERS, len(self._buffers))):
            piece = self._buffers[index][start : start + most]
            found.append(piece)
            most -= len(piece)
            if most == 0:
                break
            start = 0
        return found

    def advance(self, count: int) -> None:
        """So many bytes have come."""
        self.left -= count
        self._filled += count
        while self._index < len(self._buffers) and self._filled >= len(self._buffers[self._index]):
            self._filled -= len(self._buffers[self._index])
            self._index += 1

    def put(self, data: bytes | memoryview) -> None:
        """Copies bytes to where they belong; there must be room for them."""
        at = 0
        while at < len(data):
            for piece in self.next(len(data) - at):
                piece[:] = data[at : at + len(piece)]
                at += len(piece)
                self.advance(len(piece))
