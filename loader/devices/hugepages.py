"""Shared memory in huge pages, where this machine lets us have it.

Faulting in small pages is what a load into shared memory costs most: 4 KiB at a time the kernel
zeroes and maps. `madvise` on a memfd gains nothing where `shmem_enabled` is `never`, the default,
so there are two other ways: a hugetlb memfd, from pages that were reserved at boot, and a file on
a tmpfs of our own mounted `huge=always`, which needs CAP_SYS_ADMIN and no mount point.
"""

from __future__ import annotations

import ctypes
import os

from coldframe.loader.arena import HUGE_PAGE, round_up

__all__ = ["allocate_huge"]

# The same numbers on every architecture.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_SET_STRING, _CREATE = 1, 6


def allocate_huge(purpose: str, nbytes: int) -> tuple[int, str] | None:
    """Memory in huge pages that other processes can map.

    Args:
        purpose: What for; shows in memory maps where it can.
        nbytes: How much; rounded up to whole huge pages.

    Returns:
        A descriptor and which way it was had, `hugetlb` or `tmpfs`; None where neither is open.
    """
    size = round_up(max(nbytes, 1), HUGE_PAGE)
    fd = _hugetlb(purpose, size)
    if fd is not None:
        return fd, "hugetlb"
    fd = _tmpfs(f"coldframe-{purpose}", size)
    return None if fd is None else (fd, "tmpfs")


def _hugetlb(purpose: str, size: int) -> int | None:
    # Mapping more than there is fails only at the first touch, with SIGBUS: ask before.
    if _free_reserved_bytes() < size:
        return None
    try:
        flags = os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB
        fd = os.memfd_create(f"coldframe-{purpose}", flags)
    except OSError:
        return None
    try:
        os.fchmod(fd, 0o600)  # see `host_arena`
        os.ftruncate(fd, size)
        # Takes the pages now, so that nobody else can between here and the first touch.
        os.posix_fallocate(fd, 0, size)
    except OSError:
        os.close(fd)
        return None
    return fd


def _tmpfs(name: str, size: int) -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    context = libc.syscall(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    if context < 0:
        return None
    try:
        for key, value in ((b"huge", b"always"), (b"size", str(size).encode()), (b"mode", b"0700")):
            if libc.syscall(_SYS_FSCONFIG, context, _SET_STRING, key, value, 0) < 0:
                return None
        if libc.syscall(_SYS_FSCONFIG, context, _CREATE, None, None, 0) < 0:
            return None
        mount = libc.syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    if mount < 0:
        return None
    try:
        # The mount is attached nowhere; it lives as long as the file, and the file as long as
        # somebody holds or maps it. Its name is for memory maps.
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=mount)
        os.unlink(name, dir_fd=mount)
    except OSError:
        return None
    finally:
        os.close(mount)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        return None
    return fd


def _free_reserved_bytes() -> int:
    try:
        with open("/proc/meminfo", "rb") as file:
            words = {line.split(b":")[0]: line.split() for line in file}
        free = int(words[b"HugePages_Free"][1]) - int(words[b"HugePages_Rsvd"][1])
        return free * HUGE_PAGE if int(words[b"Hugepagesize"][1]) * 1024 == HUGE_PAGE else 0
    except (OSError, KeyError, ValueError):
        return 0
