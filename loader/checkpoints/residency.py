"""How much of a file is in the page cache: asked of the kernel, not guessed."""

from __future__ import annotations

import ctypes
import mmap

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


def cached_bytes(fd: int, offset: int, length: int) -> int:
    """How many bytes of a stretch of a file are in the page cache, counted in whole pages.

    Args:
        fd: The file.
        offset: Where the stretch begins.
        length: Its bytes; not beyond the file's end.
    """
    if length == 0:
        return 0
    first = offset - offset % mmap.PAGESIZE
    span = offset + length - first
    pages = _by_cachestat(fd, first, span)
    if not pages:
        # None is also said of an overlay's files, as a container's image has them: their pages are
        # another file's, which a mapping leads to.
        pages = _by_mincore(fd, first, span)
    missing = -(-span // mmap.PAGESIZE) - pages
    return max(0, length - missing * mmap.PAGESIZE)


def _by_cachestat(fd: int, offset: int, length: int) -> int | None:
    libc = ctypes.CDLL(None, use_errno=True)
    asked, answer = _Range(offset, length), _Cachestat()
    # A kernel before 6.5, a sandbox or a file system without page cache refuses: fall back.
    if libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(asked), ctypes.byref(answer), 0) != 0:
        return None
    return int(answer.cached)


def _by_mincore(fd: int, offset: int, length: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    pages = -(-length // mmap.PAGESIZE)
    vector = (ctypes.c_ubyte * pages)()
    try:
        area = Reservation(length)
    except ArenaError:
        return 0
    try:
        area.attach([Segment(fd, offset, length, 0, False)])
        address = ctypes.c_void_p(area.address)
        if libc.mincore(address, ctypes.c_size_t(length), vector) != 0:
            return 0
    except ArenaError:
        return 0
    finally:
        area.close()
    return bytes(vector).translate(_LOW_BIT).count(1)
