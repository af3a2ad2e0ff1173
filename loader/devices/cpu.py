"""The CPU as a device: weights and KV in anonymous shared memory."""

from __future__ import annotations

import fcntl
import mmap
import os

from coldframe.loader.arena import PAGE, round_up
from coldframe.loader.cgroup import memory_available
from coldframe.loader.devices.hugepages import allocate_huge
from coldframe.loader.errors import DeviceError

__all__ = ["CpuDevice"]


class CpuDevice:
    """Host memory, shared by descriptor.

    What is filled at once lies in huge pages where they can be had, and else in a memfd, rather
    than in a file in /dev/shm, which is 64 MB in a container by default.
    """

    name = "cpu"

    def available(self) -> int:
        return memory_available()

    def allocate(self, purpose: str, nbytes: int, *, now: bool) -> int:
        left = self.available()
        # Shared memory that is not there kills whoever touches it, so ask before.
        if nbytes > left:
            raise DeviceError(
                f"not enough memory for the {purpose}",
                where=self.name,
                expected=f"{nbytes:,} bytes",
                got=f"{left:,} bytes available",
                hint="Raise the container's memory limit or take a smaller model.",
            )
        huge = allocate_huge(purpose, nbytes) if now else None
        if huge is not None:
            return huge[0]
        fd = os.memfd_create(f"coldframe-{purpose}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Who gets it for reading shall not open it anew for writing, being another user.
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, round_up(max(nbytes, 1), PAGE))
            # Nobody who maps it need fear that it shrinks (SIGBUS).
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except (OSError, OverflowError) as error:
            os.close(fd)
            raise DeviceError(
                f"cannot allocate the {purpose}",
                where=self.name,
                expected=f"{nbytes:,} bytes",
                got=error.strerror if isinstance(error, OSError) else error,
            ) from error
        return fd

    def discard(self, fd: int, nbytes: int) -> None:
        try:
            with mmap.mmap(fd, nbytes) as view:
                view.madvise(mmap.MADV_REMOVE)
        except OSError as error:
            raise DeviceError(
                "memory cannot be given back",
                where=self.name,
                expected=f"{nbytes:,} bytes",
                got=error.strerror,
            ) from error
