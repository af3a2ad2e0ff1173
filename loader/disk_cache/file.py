"""One file of a cache entry while it is written: its bytes in any order, its hashes piece by piece.

Written with O_DIRECT where that is possible. The bytes then go from the arena to the disk without a
copy, at hardly any cost to the processors that the load needs, and the page cache, where a second
copy of the weights would push out what others use, stays as it is.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from coldframe.loader.checkpoints.pieces import digest_of, hash_package, split
from coldframe.loader.sources.direct import BLOCK, congruent, cut

__all__ = ["CacheFile", "Scratch"]

_SCRATCH = 4 << 20
_CACHED = 32 << 20  # what may be in the page cache of a file that takes no direct writes


class Scratch:
    """A buffer that O_DIRECT can write from, whatever the offset in the file."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, _SCRATCH + BLOCK))

    def at(self, offset: int, length: int) -> memoryview:
        """For at most 4 MiB that belong at an offset of a file."""
        begin = offset % BLOCK
        return self._memory[begin : begin + min(length, _SCRATCH)]


class CacheFile:
    """A file of known size and pieces. For one thread at a time.

    Args:
        folder: A descriptor of the folder that it is in.
        name: Its name; there must be no such file.
        cuts: As `pieces.cuts_of` has them.
        scratch: For bytes that do not lie as O_DIRECT needs them.

    Raises:
        OSError: It cannot be made, or there is no room for it.
        PlatformError: The package that hashes is missing.
    """

    def __init__(self, folder: int, name: str, cuts: array[int], scratch: Scratch) -> None:
        self._cuts = cuts
        self._scratch = scratch
        self._xxhash = hash_package()
        self._digests: list[bytes | None] = [None] * (len(cuts) - 1)
        self._loose: dict[int, list[tuple[int, list[memoryview]]]] = {}
        self._cached = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(name, flags, 0o600, dir_fd=folder)
        self._direct: int | None = None
        try:
            _allocate(self._fd, cuts[-1])
            self._direct = _open_direct(folder, name)
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def digests(self) -> bytes:
        """The hashes of all pieces.

        Raises:
            ValueError: Some are missing.
        """
        found = [digest for digest in self._digests if digest is not None]
        if len(found) != len(self._digests):
            raise ValueError("there are pieces missing")
        return b"".join(found)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Offset and length of what is not in: whole pieces, joined up to 4 MiB."""
        start = end = 0
        for piece, digest in enumerate(self._digests):
            if digest is not None:
                continue
            begin, stop = self._cuts[piece], self._cuts[piece + 1]
            if begin != end or stop - start > _SCRATCH:
                if end > start:
                    yield start, end - start
                start = begin
            end = stop
        if end > start:
            yield start, end - start

    def write_header(self, raw: bytes | bytearray) -> None:
        """Writes what is before the data.

        Raises:
            OSError: It could not be written.
        """
        _pwrite(self._fd, 0, memoryview(raw))

    def take(self, offset: int, parts: Sequence[memoryview], *, stays: bool) -> None:
        """Writes consecutive bytes of the data, and hashes the pieces that are whole with them.

        Args:
            offset: Where they belong.
            parts: The bytes, one buffer after the other.
            stays: Whether the buffers keep their content, so that pieces which are cut in two can
                be hashed when the rest comes. Of buffers that do not, such pieces stay missing.

        Raises:
            OSError: They could not be written.
        """
        end = offset + sum(map(len, parts))
        self._write(offset, end, parts)
        first, last = bisect_right(self._cuts, offset) - 1, bisect_left(self._cuts, end)
        bounds = [offset, *self._cuts[first + 1 : last], end]
        for piece, views in enumerate(split(parts, bounds), first):
            begin, stop = self._cuts[piece], self._cuts[piece + 1]
            if offset <= begin and stop <= end:
                self._digests[piece] = digest_of(views, self._xxhash)
            elif stays:
                self._collect(piece, max(begin, offset), views)

    def _collect(self, piece: int, offset: int, views: list[memoryview]) -> None:
        loose = self._loose.setdefault(piece, [])
        loose.append((offset, views))
        at, stop = self._cuts[piece], self._cuts[piece + 1]
        if sum(len(view) for _, found in loose for view in found) < stop - at:
            return
        del self._loose[piece]
        whole: list[memoryview] = []
        for start, found in sorted(loose, key=lambda item: item[0]):
            if start != at:  # the same bytes came twice: the piece is still missing
                return
            whole += found
            at += sum(map(len, found))
        self._digests[piece] = digest_of(whole, self._xxhash)

    def _write(self, offset: int, end: int, parts: Sequence[memoryview]) -> None:
        if len(parts) == 1 and (self._direct is None or congruent(offset, parts[0])):
            self._write_part(offset, parts[0])
            return
        for views in split(parts, [*range(offset, end, _SCRATCH), end]):
            buffer = self._scratch.at(offset, sum(map(len, views)))
            at = 0
            for view in views:
                buffer[at : at + len(view)] = view
                at += len(view)
            self._write_part(offset, buffer)
            offset += len(buffer)

    def _write_part(self, offset: int, part: memoryview) -> None:
        if self._direct is None:
            self._write_cached(offset, part)
            return
        head, body, _ = cut(offset, len(part))
        self._write_cached(offset, part[:head])
        try:
            _pwrite(self._direct, offset + head, part[head : head + body])
        except OSError as error:
            # Some file systems accept the flag and refuse the write.
            if error.errno != errno.EINVAL:
                raise
            self._close_direct()
            self._write_cached(offset + head, part[head : head + body])
        self._write_cached(offset + head + body, part[head + body :])

    def _write_cached(self, offset: int, part: memoryview) -> None:
        _pwrite(self._fd, offset, part)
        self._cached += len(part)
        if self._cached >= _CACHED:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._cached = 0

    def sync(self) -> None:
        """Returns once all of it is on the disk.

        Raises:
            OSError: It could not be written.
        """
        os.fsync(self._fd)

    def close(self) -> None:
        self._loose.clear()
        self._close_direct()
        os.close(self._fd)

    def _close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _open_direct(folder: int, name: str) -> int | None:
    try:
        return os.open(name, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None  # a file system without it, as some tmpfs


def _pwrite(fd: int, offset: int, part: memoryview) -> None:
    while part:
        count = os.pwrite(fd, part, offset)
        offset += count
        part = part[count:]


def _allocate(fd: int, size: int) -> None:
    """Takes the room now, in one piece, rather than find out late that there is none."""
    if size == 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # Not os.posix_fallocate: that writes to every block where the file system cannot do it.
    if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)
