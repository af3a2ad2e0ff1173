"""Whether a file is in the page cache, all of it: asked of the kernel, not guessed."""

from __future__ import annotations

import ctypes
import mmap
import os

from coldframe.loader.arena import Reservation, Segment
from coldframe.loader.errors import ArenaError

__all__ = ["cached_bytes"]

# One number on every architecture that has it (Linux 6.5).
_SYS_CACHESTAT = 451
# mincore answers in the lowest bit of each page's byte and leaves the others undefined.
_LOW_BIT = bytes(byte & 1 for byte in range(256))


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = (
        ("cached", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("writeback", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


def cached_bytes(fd: int) -> int:
    """How many bytes of a file are in the page cache, counted in whole pages within its size."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    pages = _by_cachestat(fd, size)
    if pages is None:
        pages = _by_mincore(fd, size)
    return min(pages * mmap.PAGESIZE, size)


def _by_cachestat(fd: int, size: int) -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    asked, answer = _Range(0, size), _Cachestat()
    # A kernel before 6.5, a sandbox or a file system without page cache refuses: fall back.
    if libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(answer), 0) != 0:
        return None
    return int(answer.cached)


def _by_mincore(fd: int, size: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    pages = -(-size // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    try:
        area = Reservation(size)
    except ArenaError:
        return 0
    try:
        area.attach([Segment(fd, 0, size, 0, False)])
        address = ctypes.c_void_p(area.address)
        if libc.mincore(address, ctypes.c_size_t(size), vector) != 0:
            return 0
    except ArenaError:
        return 0
    finally:
        area.close()
    return bytes(vector).translate(_LOW_BIT).count(1)
