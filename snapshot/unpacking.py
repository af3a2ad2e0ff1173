"""Objects made into the files of an image again, every piece held against its hash on the way.

Each thread has one piece in hand: it reads it into a buffer of its own, hashes it there, unpacks
it, and writes it out. Nobody else can change what has been hashed before it is used, and the
buffer stays in the core's cache. Writing to a tmpfs that is mounted `huge=within_size` takes a
third of the time that it takes page by page, and mapping the file to read into it is no faster.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from coldframe.loader.errors import ColdframeError, ImageDamaged, SnapshotError
from coldframe.snapshot.image_files import PIECE_BYTES, ImageFile, StoredObject
from coldframe.snapshot.lz4_codec import unpacker

__all__ = ["Reader", "unpack"]

_GONE = "Remove the image; a new one is made in its place."


class Reader(Protocol):
    """Gives the bytes of objects. Safe for several threads."""

    def read(self, item: StoredObject, offset: int, buffer: memoryview) -> None:
        """Fills a buffer with an object's stored bytes from an offset on.

        Raises:
            ColdframeError: It is not there, has another size, or cannot be read.
        """


class _Run(NamedTuple):
    """Pieces of an object that are read in one go."""

    number: int
    first: int
    last: int
    offset: int
    nbytes: int


def unpack(
    objects: Sequence[StoredObject],
    files: Sequence[ImageFile],
    into: str,
    reader: Reader,
    *,
    threads: int,
    run_bytes: int,
    verify: bool,
) -> None:
    """Writes files of an image into a directory; all of them or none.

    Args:
        objects: All objects of the image.
        files: Those to write.
        into: A directory, which has none of them.
        reader: Where the objects are read.
        threads: How many.
        run_bytes: What a request asks for, more or less: a network wants more than a piece.
        verify: Whether each piece is held against its hash.

    Raises:
        SnapshotError: A piece is not what was stored, or there is no room.
    """
    work = _Work(objects, files, into, reader, verify)
    made: list[str] = []
    try:
        _check_room(files, into)
        for file in files:
            work.add(file, made)
        runs = _runs(objects, {file.object_index for file in files}, run_bytes)
        work.longest = max((run.nbytes for run in runs), default=0)
        work.runs = runs
        helpers = [threading.Thread(target=work.run, daemon=True) for _ in range(threads - 1)]
        try:
            for helper in helpers:
                helper.start()
            work.run()
        finally:
            work.runs = []
            for helper in helpers:
                if helper.ident is not None:
                    helper.join()
        if work.error is not None:
            raise work.error
    except BaseException as error:
        for path in made:
            os.unlink(path)
        if isinstance(error, OSError):
            raise _not_written(error, files, into) from error
        raise
    finally:
        work.close()


class _Work:
    """What the threads share."""

    def __init__(
        self,
        objects: Sequence[StoredObject],
        files: Sequence[ImageFile],
        into: str,
        reader: Reader,
        verify: bool,
    ) -> None:
        self.runs: list[_Run] = []
        self.longest = 0
        self.error: BaseException | None = None
        self._objects = objects
        self._into = into
        self._reader = reader
        self._verify = verify
        self._targets: dict[int, list[tuple[ImageFile, int]]] = {}
        packed = any(objects[file.object_index].codec == "lz4" for file in files)
        self._unpacker = unpacker() if packed else None

    def add(self, file: ImageFile, made: list[str]) -> None:
        path = os.path.join(self._into, file.name)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path, flags, 0o600)
        made.append(path)
        self._targets.setdefault(file.object_index, []).append((file, fd))
        os.ftruncate(fd, file.size)  # a huge page is taken only where the file is known to fill it

    def close(self) -> None:
        for targets in self._targets.values():
            for _, fd in targets:
                os.close(fd)

    def run(self) -> None:
        """Takes runs until there are no more, or one has failed."""
        # Made once: memory that is new costs more than what is then done with it.
        buffer = memoryview(mmap.mmap(-1, max(self.longest, 1)))
        plain = memoryview(mmap.mmap(-1, PIECE_BYTES))
        while self.error is None:
            try:
                run = self.runs.pop()  # atomic, so that no lock is needed
            except IndexError:
                return
            try:
                self._copy(run, buffer[: run.nbytes], plain)
            except BaseException as error:  # noqa: BLE001  # raised by the thread that waits for all
                self.error = self.error or error

    def _copy(self, run: _Run, buffer: memoryview, plain: memoryview) -> None:
        item = self._objects[run.number]
        try:
            self._reader.read(item, run.offset, buffer)
        except ColdframeError as error:
            kind = ImageDamaged if isinstance(error, ImageDamaged) else SnapshotError
            raise kind(
                error.what,
                where=f"{error.where}, which holds {self._names(run.number)}",
                expected=error.expected,
                got=error.got,
                hint=_GONE if isinstance(error, SnapshotError) else error.hint,
            ) from error
        at = 0
        for piece in range(run.first, run.last):
            nbytes, digest = item.pieces[piece]
            stored = buffer[at : at + nbytes]
            at += nbytes
            if self._verify:
                self._check(run.number, piece, stored, digest)
            self._write(run.number, piece, self._plain(run.number, piece, stored, plain))

    def _check(self, number: int, piece: int, stored: memoryview, expected: str) -> None:
        import hashlib

        found = hashlib.sha256(stored).hexdigest()
        if found != expected:
            raise ImageDamaged(
                "the image is not what was stored",
                where=self._place(number, piece),
                expected=f"sha256 {expected}",
                got=found,
                hint="A disk or a copy is at fault, or somebody has changed it. " + _GONE,
            )

    def _plain(self, number: int, piece: int, stored: memoryview, buffer: memoryview) -> memoryview:
        """A piece as it is in the file; `buffer` is room for it."""
        item = self._objects[number]
        if item.codec == "raw" or self._unpacker is None:
            return stored
        size = min(PIECE_BYTES, item.size - piece * PIECE_BYTES)
        found = self._unpacker(stored, buffer[:size])
        if found != size:
            raise ImageDamaged(
                "a piece of the image cannot be unpacked",
                where=self._place(number, piece),
                expected=f"{size} bytes",
                got="no LZ4 block of that size" if found < 0 else f"{found} bytes",
                hint=_GONE,
            )
        return buffer[:size]

    def _write(self, number: int, piece: int, plain: memoryview) -> None:
        start = piece * PIECE_BYTES
        end = start + plain.nbytes
        for file, fd in self._targets[number]:
            first, last = max(start, file.offset), min(end, file.offset + file.size)
            while first < last:
                part = plain[first - start : last - start]
                first += os.pwrite(fd, part, first - file.offset)

    def _place(self, number: int, piece: int) -> str:
        name = self._objects[number].digest
        return f"object {name}, which holds {self._names(number)}, piece {piece}"

    def _names(self, number: int) -> str:
        names = [file.name for file, _ in self._targets[number]]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _runs(objects: Sequence[StoredObject], wanted: set[int], run_bytes: int) -> list[_Run]:
    """What is read in one go, in an order to be taken from the end."""
    found: list[_Run] = []
    for number in sorted(wanted):
        pieces = objects[number].pieces
        first = offset = nbytes = 0
        for index, (size, _) in enumerate(pieces):
            nbytes += size
            if nbytes >= run_bytes or index + 1 == len(pieces):
                found.append(_Run(number, first, index + 1, offset, nbytes))
                first, offset, nbytes = index + 1, offset + nbytes, 0
    return found[::-1]


def _check_room(files: Sequence[ImageFile], into: str) -> None:
    about = os.statvfs(into)
    if about.f_bavail * about.f_frsize < sum(file.size for file in files):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _not_written(error: OSError, files: Sequence[ImageFile], into: str) -> SnapshotError:
    expected = free = None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        about = os.statvfs(into)
        expected = f"{sum(file.size for file in files)} bytes"
        free = f"{about.f_bavail * about.f_frsize} bytes free"
    return SnapshotError(
        "the image cannot be written out",
        where=error.filename or into,
        expected=expected,
        got=free or error.strerror,
        hint="Give it a directory in memory that is its own and has room for all of it.",
    )
