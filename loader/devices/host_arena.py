"""An arena in the host's memory: shared memory, by descriptor."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from coldframe.loader.arena import PAGE, Reservation, Segment, round_up
from coldframe.loader.devices.base import Mapping, Stretches
from coldframe.loader.devices.hugepages import allocate_huge
from coldframe.loader.errors import ArenaError, DeviceError
from coldframe.loader.memory import copy

__all__ = ["HostArena"]


class HostArena:
    """Shared memory, mapped here and writable here.

    What is filled at once lies in huge pages where they can be had, and else in a memfd, rather
    than in a file in /dev/shm, which is 64 MB in a container by default.

    Args:
        device: The device's name, for messages.
        purpose: What for; it shows in the process's memory map.
        size: Bytes; rounded up to whole pages.
        base: The wanted address; None leaves it to the kernel.
        now: See `Device.arena`.

    Attributes:
        segments: What others map: one, of all of it.

    Raises:
        DeviceError: There is no such memory.
        ArenaError: There is no room for it among the addresses of this process.
    """

    lingers_s = 0.0

    def __init__(
        self, device: str, purpose: str, size: int, base: int | None = None, *, now: bool
    ) -> None:
        self._device = device
        self.size = round_up(max(size, 1), PAGE)
        self._fd = self._allocate(purpose, now)
        try:
            self._reservation = Reservation(self.size, base)
            self._reservation.attach([Segment(self._fd, 0, self.size, 0, True)])
            shared = self._fd
            if now:
                # What others get can neither be written nor cut, whatever kind of memory it is.
                shared = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._fd)
            raise
        if now:
            os.close(self._fd)
            self._fd = shared
        self.segments = [Segment(shared, 0, self.size, 0, not now)]

    def _allocate(self, purpose: str, now: bool) -> int:
        huge = allocate_huge(purpose, self.size) if now else None
        if huge is not None:
            return huge[0]
        fd = os.memfd_create(f"coldframe-{purpose}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Who gets it for reading shall not open it anew for writing, being another user.
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, self.size)
            # Nobody who maps it need fear that it shrinks (SIGBUS).
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise DeviceError(
                f"cannot allocate the {purpose}",
                where=self._device,
                expected=f"{self.size:,} bytes",
                got=error.strerror if isinstance(error, OSError) else error,
            ) from error
        return fd

    @property
    def address(self) -> int:
        return self._reservation.address

    @property
    def grown(self) -> int:
        """All of it: memory is taken as it is touched."""
        return self.size

    def grow(self, nbytes: int) -> Segment:
        raise ArenaError(
            "the arena cannot grow", where=self._device, expected="0 bytes", got=f"{nbytes:,} bytes"
        )

    def discard(self) -> bool:
        try:
            with mmap.mmap(self._fd, self.size) as view:
                view.madvise(mmap.MADV_REMOVE)
        except (OSError, ValueError) as error:
            raise DeviceError(
                "memory cannot be given back",
                where=self._device,
                expected=f"{self.size:,} bytes",
                got=error.strerror if isinstance(error, OSError) else error,
            ) from error
        return False

    def view(self, offset: int = 0, length: int | None = None) -> memoryview:
        """The bytes at an offset, writable."""
        return self._reservation.view(offset, length)

    def read(self, offset: int, into: memoryview) -> None:
        copy(into, self.view(offset, len(into)))

    def write(self, offset: int, data: memoryview) -> None:
        copy(self.view(offset, len(data)), data)

    def take(self, source: Mapping, stretches: Stretches) -> None:
        for to, start, length in stretches:
            ctypes.memmove(self.address + to, source.address + start, length)

    def fault_in(self, offset: int, length: int) -> None:
        """See `Reservation.fault_in`."""
        self._reservation.fault_in(offset, length)

    def close(self) -> None:
        """Unmaps it here. The memory lives on while somebody else has it mapped."""
        self._reservation.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
