"""The bytes of an arena as this process gets at them, wherever they lie."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["HostMemory", "Memory", "borrowed", "copy"]


class Memory(Protocol):
    """Bytes that can be read and written; whether by looking at them is up to where they are.

    For several threads. Offsets and lengths are in bytes, and within the memory.
    """

    def view(self, offset: int, length: int) -> memoryview | None:
        """The very bytes; None where the host cannot look at them, as in a GPU's memory."""
        ...

    def read(self, offset: int, into: memoryview) -> None:
        """Copies bytes out.

        Raises:
            DeviceError: The device broke.
        """
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Copies bytes in.

        Raises:
            DeviceError: The device broke.
        """
        ...


class HostMemory:
    """Memory of the host.

    Args:
        memory: Its bytes, writable if they are to be written.
    """

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def view(self, offset: int, length: int) -> memoryview:
        return self._memory[offset : offset + length]

    def read(self, offset: int, into: memoryview) -> None:
        copy(into, self.view(offset, len(into)))

    def write(self, offset: int, data: memoryview) -> None:
        copy(self.view(offset, len(data)), data)


def copy(target: memoryview, source: memoryview) -> None:
    """Copies bytes; other threads run meanwhile, which a slice assignment would not let them."""
    ctypes.memmove(_address(target), _address(source), len(source))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@contextmanager
def borrowed(
    memory: Memory, offset: int, length: int, *, write: bool = False
) -> Iterator[memoryview]:
    """Bytes of an arena as the host's: themselves, or a copy where they cannot be looked at.

    Args:
        memory: Whose.
        offset: Of the first.
        length: How many.
        write: Whether they are to be filled. What they hold before is undefined then, and they
            are theirs once the block ends without an exception.

    Raises:
        DeviceError: The device broke.
    """
    view = memory.view(offset, length)
    if view is not None:
        yield view
        return
    buffer = memoryview(bytearray(length))
    if not write:
        memory.read(offset, buffer)
    yield buffer
    if write:
        memory.write(offset, buffer)
