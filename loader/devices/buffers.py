"""Host memory that a device can read by itself, once it is locked."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

from coldframe.loader.arena import HUGE_PAGE, round_up
from coldframe.loader.devices.driver import Event
from coldframe.loader.errors import DeviceFull

__all__ = ["Buffer", "make_buffers", "private_memory"]


class Buffer:
    """One buffer, and the event behind its last copy.

    Attributes:
        view: Its bytes.
        address: Where they are.
        locked: Whether the driver has locked it.
        event: None before there is a device.
    """

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        self.locked = False
        self.event: Event | None = None


def make_buffers(count: int, nbytes: int) -> list[Buffer]:
    """Buffers that lie behind one another, page-aligned; the memory goes with the last of them.

    Args:
        count: How many.
        nbytes: Of each; whole pages.

    Raises:
        DeviceFull: The host has no room for them.
    """
    memory = private_memory(
        round_up(count * nbytes, HUGE_PAGE),
        "there is no host memory for what is on its way to the GPU",
    )
    view = memoryview(memory)
    return [Buffer(view[at : at + nbytes]) for at in range(0, count * nbytes, nbytes)]


def private_memory(size: int, without: str) -> mmap.mmap:
    """Memory of the host's that a device can be let to, in huge pages where they can be had.

    Private, and no concern of children: after a fork, the first write to a page that the device
    reads would move it elsewhere.

    Args:
        size: Bytes.
        without: What is wrong where there is none.

    Raises:
        DeviceFull: There is none.
    """
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DeviceFull(
            without,
            expected=f"{size:,} bytes",
            got=error.strerror,
            hint="Raise the container's memory limit, or the limit on address space (ulimit -v).",
        ) from error
    for advice in (mmap.MADV_DONTFORK, mmap.MADV_HUGEPAGE):
        # A kernel may know none of it: then it does not matter, or cannot be helped.
        with suppress(OSError):
            memory.madvise(advice)
    return memory
