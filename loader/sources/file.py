"""Weights from local files: positional reads, or the files themselves where they are cached."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Sequence

from coldframe.loader.checkpoints.checkpoint import Shard
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.errors import SourceChanged, SourceDenied, SourceError, SourceNotFound
from coldframe.loader.files import version_of
from coldframe.loader.sources.direct import BLOCK, congruent, cut, open_direct

__all__ = ["FileSource"]

_SCRATCH = 1 << 20
_DIRECT_READERS = 8
_MOST_BUFFERS = 1024  # IOV_MAX


class FileSource:
    """The shards of a checkpoint in a local directory, held open.

    Raises:
        SourceError: A shard is not there, may not be read, or is not the one that was planned.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = tuple(shards)
        self.fds: list[int] = []
        self._direct: list[int] = []
        self._leased = False
        self._scratch = threading.local()
        try:
            for shard in self._shards:
                self.fds.append(_open(shard))
            self.finish()
        except BaseException:
            self.close()
            raise

    def use_direct(self) -> bool:
        """Reads past the page cache from now on, where the file system lets us.

        For files that are not in the page cache; those that are come faster from there.
        """
        for shard in self._shards:
            fd = open_direct(shard.uri)
            if fd is None:
                self._close_direct()
                return False
            self._direct.append(fd)
        try:
            self._check(self._direct)  # opened by name again, so it could be another file
        except SourceChanged:
            self._close_direct()
            raise
        # The ragged ends that are still read the usual way must not pull in what lies around.
        for fd in self.fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return True

    chunk = None
    verified = None

    @property
    def readers(self) -> int | None:
        """Requests that the disk has before it at once; who waits for them needs no processor."""
        return _DIRECT_READERS if self._direct else None

    @property
    def note(self) -> str:
        return "direct" if self._direct else "buffered"

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        if not self._direct:
            self._read(self.fds[shard], shard, offset, parts)
            return
        if len(parts) > 1 or not congruent(offset, parts[0]):
            bounce = self._bounce(offset, sum(map(len, parts)))
            self.read_into(shard, offset, [bounce])
            at = 0
            for part in parts:
                part[:] = bounce[at : at + len(part)]
                at += len(part)
            return
        (part,) = parts
        head, body, _ = cut(offset, len(part))
        self._read(self.fds[shard], shard, offset, [part[:head]])
        self._read(self._direct[shard], shard, offset + head, [part[head : head + body]])
        self._read(self.fds[shard], shard, offset + head + body, [part[head + body :]])

    def _bounce(self, offset: int, length: int) -> memoryview:
        """A buffer of the calling thread that O_DIRECT can fill from an offset on."""
        wanted = length + BLOCK
        buffer: memoryview | None = getattr(self._scratch, "bounce", None)
        if buffer is None or len(buffer) < wanted:
            buffer = self._scratch.bounce = memoryview(mmap.mmap(-1, wanted))
        return buffer[offset % BLOCK : offset % BLOCK + length]

    def _read(self, fd: int, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        left = [part for part in parts if part]
        while left:
            try:
                count = os.preadv(fd, left[:_MOST_BUFFERS], offset)
            except OSError as error:
                raise SourceError(
                    "a weight file cannot be read",
                    where=f"{self._shards[shard].uri} at {offset}",
                    got=error.strerror,
                    hint="Check the disk; then start again.",
                ) from error
            if count == 0:
                raise self._changed(shard, "ended early", f"byte {offset}")
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def finish(self) -> None:
        self._check(self.fds)

    def _check(self, fds: list[int]) -> None:
        for index, (shard, fd) in enumerate(zip(self._shards, fds, strict=True)):
            status = os.fstat(fd)
            if status.st_size != shard.size:
                raise self._changed(index, "has another size", f"{status.st_size} bytes")
            if version_of(status) != shard.version:
                raise self._changed(index, "was modified", "another file or modification time")

    def make_resident(self, shard: int, offset: int, length: int) -> None:
        """Brings bytes of a shard that is mapped in place into the page cache.

        Raises:
            SourceError: They could not be had.
        """
        missing = length - cached_bytes(self.fds[shard], offset, length)
        if missing <= 0:
            return
        # A read, not read-ahead advice: when it returns the pages are there, or an error is.
        scratch = memoryview(bytearray(min(length, _SCRATCH)))
        for start in range(offset, offset + length, _SCRATCH):
            self.read_into(shard, start, [scratch[: min(_SCRATCH, offset + length - start)]])

    def cached_bytes(self) -> int:
        """How much of all shards is in the page cache."""
        return sum(
            cached_bytes(fd, 0, shard.size)
            for shard, fd in zip(self._shards, self.fds, strict=True)
        )

    def take_lease(self) -> str | None:
        """Asks for a read lease on every shard, so that no writer gets in before we are told.

        The kernel sends SIGIO when somebody opens a shard for writing or cuts it, and holds them
        back until `end_lease` (at most /proc/sys/fs/lease-break-time, 45 s by default). Install
        a handler for SIGIO first.

        Returns:
            None, or the reason why there is none: the file system has no leases, the file is
            somebody else's, or it is open for writing.
        """
        for shard, fd in zip(self._shards, self.fds, strict=True):
            try:
                fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGIO)
                # Else the signal is for the calling thread, and lost once that has ended.
                fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            except OSError as error:
                self.end_lease()
                if error.errno == errno.EAGAIN:
                    return f"{shard.name} is open for writing elsewhere"
                return f"no read lease on {shard.name}: {error.strerror}"
        self._leased = True
        return None

    def end_lease(self) -> None:
        """Lets writers in."""
        self._leased = False
        for fd in self.fds:
            try:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            except OSError:  # there was none on this one
                continue

    @property
    def lease_is_breaking(self) -> bool:
        """Whether a writer is waiting for this lease to end."""
        return self._leased and any(
            fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK for fd in self.fds
        )

    def abort(self) -> None:
        return  # a disk answers

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self._close_direct()

    def _close_direct(self) -> None:
        for fd in self._direct:
            os.close(fd)
        self._direct.clear()

    def _changed(self, shard: int, what: str, got: str) -> SourceChanged:
        expected = self._shards[shard]
        return SourceChanged(
            f"a weight file {what} while it was loaded",
            where=expected.uri,
            expected=f"{expected.size} bytes, unchanged",
            got=got,
            hint="Let nothing write to a checkpoint that is in use; then start again.",
        )


def _open(shard: Shard) -> int:
    try:
        return os.open(shard.uri, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SourceNotFound("a weight file is gone", where=shard.uri) from error
    except PermissionError as error:
        raise SourceDenied(
            "a weight file may not be read", where=shard.uri, hint="Check its permissions."
        ) from error
    except OSError as error:
        raise SourceError(
            "a weight file cannot be opened", where=shard.uri, got=error.strerror
        ) from error
