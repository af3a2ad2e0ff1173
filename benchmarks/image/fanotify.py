"""Which files are opened on a file system, as the kernel tells it: fanotify(7), by ctypes.

What costs little is taken: an event for each opening, behind it, without a say in it. Events are of
whole file systems, so that processes in mount namespaces of their own, such as clones, are seen.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

from coldframe.loader.errors import PlatformError

__all__ = ["Opened", "Watch"]

_CLOEXEC, _NONBLOCK, _UNLIMITED_QUEUE = 0x1, 0x2, 0x10
_MARK_ADD, _MARK_FILESYSTEM = 0x1, 0x100
_OPEN, _OPEN_EXEC, _OVERFLOW = 0x20, 0x1000, 0x4000
_AT_FDCWD = -100
_EVENT = struct.Struct("=IBBHQii")  # struct fanotify_event_metadata
_READ_BYTES = 1 << 16


class Opened(NamedTuple):
    """A file was opened.

    Args:
        path: Its own, whatever links have led there.
        pid: Who opened it.
        at_ns: When that was read (CLOCK_MONOTONIC).
    """

    path: str
    pid: int
    at_ns: int


class Watch:
    """Notices each opening of a file on some file systems, from now on.

    Args:
        places: A path on each of them.

    Attributes:
        overflown: Whether the kernel has dropped some.

    Raises:
        PlatformError: This process may not, or a file system cannot be watched.
    """

    def __init__(self, places: Iterable[str]) -> None:
        self.overflown = False
        libc = ctypes.CDLL(None, use_errno=True)
        flags = _CLOEXEC | _NONBLOCK | _UNLIMITED_QUEUE
        self.fd: int = libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC | os.O_LARGEFILE)
        if self.fd < 0:
            raise _failure("files that are opened cannot be watched", "fanotify_init")
        libc.fanotify_mark.argtypes = (
            *(ctypes.c_int, ctypes.c_uint, ctypes.c_uint64),
            *(ctypes.c_int, ctypes.c_char_p),
        )
        try:
            for place in places:
                mark, kinds = _MARK_ADD | _MARK_FILESYSTEM, _OPEN | _OPEN_EXEC
                if libc.fanotify_mark(self.fd, mark, kinds, _AT_FDCWD, os.fsencode(place)) != 0:
                    raise _failure("a file system cannot be watched", place)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self.fd)

    def opened(self) -> Iterator[Opened]:
        """What has been opened since the last call, in that order."""
        while True:
            try:
                data = os.read(self.fd, _READ_BYTES)
            except BlockingIOError:
                return
            now, at = time.monotonic_ns(), 0
            while at < len(data):
                length, _, _, _, mask, fd, pid = _EVENT.unpack_from(data, at)
                at += length
                if fd < 0:
                    self.overflown = self.overflown or bool(mask & _OVERFLOW)
                    continue
                try:
                    path = os.readlink(f"/proc/self/fd/{fd}")
                finally:
                    os.close(fd)
                yield Opened(path, pid, now)


def _failure(what: str, where: str) -> PlatformError:
    return PlatformError(
        what,
        where=where,
        got=os.strerror(ctypes.get_errno()),
        hint="This takes root with CAP_SYS_ADMIN: docker run --user 0 --cap-add SYS_ADMIN ...",
    )
