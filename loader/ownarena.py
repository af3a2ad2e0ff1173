"""An arena that is filled here: writable for the memory service, read-only for all others."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

from coldframe.loader.arena import Reservation, Segment
from coldframe.loader.devices import Device
from coldframe.loader.plan import Plan

__all__ = ["OwnArena", "move"]

_STEP = 4 << 20


class OwnArena:
    """Memory of a device, mapped here.

    Args:
        device: Whose memory.
        size: Bytes.
        base: The wanted address; None leaves it to the kernel.

    Attributes:
        segments: What others map.

    Raises:
        DeviceError: The device has not that much left.
        ArenaError: There is no room for it among the addresses of this process.
    """

    def __init__(self, device: Device, size: int, base: int | None = None) -> None:
        fd = device.allocate("weights", size, now=True)
        try:
            self._reservation = Reservation(size, base)
            self._reservation.attach([Segment(fd, 0, size, 0, True)])
            # What others get can neither be written nor cut, whatever kind of memory it is.
            self._shared = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.close(fd)
        self.segments = [Segment(self._shared, 0, size, 0, False)]

    def view(self, offset: int = 0, length: int | None = None) -> memoryview:
        """The bytes at an offset, writable."""
        return self._reservation.view(offset, length)

    def fault_in(self, offset: int, length: int) -> None:
        """See `Reservation.fault_in`."""
        self._reservation.fault_in(offset, length)

    def close(self) -> None:
        """Unmaps it here. The memory lives on while somebody else has it mapped."""
        self._reservation.close()
        os.close(self._shared)


def move(
    old: Plan, source: memoryview, new: Plan, target: memoryview, check: Callable[[], None]
) -> None:
    """Copies each tensor from where one plan has it to where another wants it.

    Args:
        old: Where they are,
        source: in these bytes.
        new: Where they are wanted,
        target: in these.
        check: Called again and again meanwhile: raises to end it early.
    """
    for name, place in new.placements.items():
        begin = old.placements[name].arena_offset
        for at in range(0, place.nbytes, _STEP):
            check()
            count = min(_STEP, place.nbytes - at)
            # memmove of ctypes lets other threads run; a slice assignment would not.
            ctypes.memmove(
                _address(target, place.arena_offset + at), _address(source, begin + at), count
            )


def _address(view: memoryview, offset: int) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view, offset))
