"""Host memory as large as an arena, locked piece by piece while it is filled.

Locked memory is what a device reads at the full rate of its link. Locking all of it first would
keep the first bytes waiting: the kernel has to find and zero each page. So a piece is locked just
before its first copy, while the device is still busy with the piece before.

A copy must not reach over two pieces: to the driver these are two stretches of memory.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress

from coldframe.loader.arena import HUGE_PAGE, round_up
from coldframe.loader.cgroup import memory_available
from coldframe.loader.devices.buffers import private_memory
from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import DeviceError, DeviceFull, DeviceLost

__all__ = ["PIECE", "LockedMemory"]

PIECE = 64 << 20
"""Bytes that are locked in one go, and copied in one go: a millisecond of a fast link."""

_NO_ROOM = "there is no host memory to park the weights in"
_SPARE = 256 << 20
"""Memory that must be left for others."""


class LockedMemory:
    """Private memory of this process, in huge pages where the kernel has them.

    Nothing is taken at first but addresses.

    Args:
        size: Bytes.
        piece: Bytes of a piece; whole huge pages.
        available: Says how many bytes can still be taken.

    Attributes:
        address: Where it begins; a multiple of the size of a huge page.

    Raises:
        DeviceFull: The host has no room for it.
    """

    def __init__(
        self,
        size: int,
        piece: int = PIECE,
        available: Callable[[], int] = memory_available,
    ) -> None:
        self.size = size
        self.piece = piece
        self._available = available
        self._ready: set[int] = set()
        self._locked: set[int] = set()
        self._not_locked: str | None = None
        self._check_room(size)
        self._memory = private_memory(round_up(size, HUGE_PAGE) + HUGE_PAGE, _NO_ROOM)
        found = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.address = round_up(found, HUGE_PAGE)
        self._lead = self.address - found

    @property
    def locked(self) -> int:
        """Bytes that are locked."""
        return sum(self._length(index) for index in self._locked)

    @property
    def note(self) -> str:
        """How it is copied, for the timeline."""
        if self._not_locked is None:
            return "locked memory"
        share = f"{self.locked:,} of {self.size:,} bytes"
        return f"memory that could not be locked but for {share}: {self._not_locked}"

    def prepare(self, driver: Driver, index: int) -> None:
        """Has the kernel find memory for a piece, and locks it; in the device's context.

        What cannot be locked is left as it is, with all that follows: copies go through buffers of
        the driver's own then, as right and slower.

        Raises:
            DeviceFull: The host has too little left.
            DeviceLost: The device broke.
        """
        if index in self._ready:
            return
        self._check_room(self._length(index))
        if self._not_locked is None:
            try:
                # For all devices: weights may come back to another one than they left.
                at = self.address + index * self.piece
                driver.register_host(at, self._length(index), portable=True)
                self._locked.add(index)
            except DeviceLost:
                raise
            except DeviceError as error:
                self._not_locked = error.got or error.what
        self._ready.add(index)

    def view(self, offset: int, length: int) -> memoryview:
        """Bytes of it. Nobody may keep them beyond `close`."""
        begin = self._lead + offset
        return memoryview(self._memory)[begin : begin + length]

    def close(self, driver: Driver) -> None:
        """Unlocks it and gives it back; in the device's context, and when no copy is under way."""
        for index in sorted(self._locked):
            # A device that is lost has let go of it.
            with suppress(DeviceError):
                driver.unregister_host(self.address + index * self.piece)
        self._locked.clear()
        # Who has kept a view keeps the memory, and it goes with the view.
        with suppress(BufferError):
            self._memory.close()

    def _length(self, index: int) -> int:
        return min(self.piece, self.size - index * self.piece)

    def _check_room(self, nbytes: int) -> None:
        # Memory that is not there kills whoever touches it, so ask before.
        left = self._available() - _SPARE
        if nbytes > left:
            raise DeviceFull(
                _NO_ROOM,
                where=f"{self.size:,} bytes of weights",
                expected=f"{nbytes:,} bytes more",
                got=f"{max(0, left):,} bytes available",
                hint="Raise the container's memory limit, or let the model go to zero instead.",
            )
