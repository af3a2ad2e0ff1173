"""The files that a process has mapped, and whether they are still the same.

An image holds no code of shared libraries: CRIU maps the files again. A library that was exchanged
meanwhile would be mapped at the old one's addresses.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.fields import Fields, Refusal

__all__ = ["Library", "identity_at_once", "mapped_files"]

_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_NO_FILES = ("/dev/", "/memfd:", "/SYSV", "/anon_hugepage", "/[")
_DELETED = " (deleted)"
_BLOCK = 1 << 20


class Library(NamedTuple):
    """A file that an image maps.

    Attributes:
        path: Where it is.
        size: Its bytes.
        mtime_ns: When it was modified last; where this has not changed, its content is taken not
            to have.
        identity: What tells its content where that has: `build-id:` and the linker's own hash, or
            `sha256:` and one of all of it. Packages that are installed again have other times.
    """

    path: str
    size: int
    mtime_ns: int
    identity: str

    @staticmethod
    def of(path: str) -> Library:
        """A file as it is now.

        Raises:
            OSError: It cannot be read.
        """
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            about = os.fstat(fd)
            return Library(path, about.st_size, about.st_mtime_ns, _identity(fd))
        finally:
            os.close(fd)

    @staticmethod
    def from_json(value: object) -> Library:
        fields = Fields.of(value, "a library")
        library = Library(
            fields.text("path"),
            fields.integer("size"),
            fields.integer("mtime_ns"),
            fields.text("identity"),
        )
        fields.end()
        return library

    def to_json(self) -> dict[str, Any]:
        return self._asdict()

    @staticmethod
    def all_of(paths: Iterable[str]) -> tuple[Library, ...]:
        """Files as they are now, in the order of their paths; what is no file is left out.

        Raises:
            SnapshotError: One of them is not there, or cannot be read.
        """
        found = []
        for path in sorted(set(paths)):
            try:
                if stat.S_ISREG(os.stat(path).st_mode):
                    found.append(Library.of(path))
            except OSError as error:
                raise _gone(path, error.strerror) from error
        return tuple(found)

    def refusal(self) -> Refusal | None:
        """What about the file is not what it was, if anything."""
        try:
            about = os.stat(self.path)
            if about.st_size != self.size:
                return self._refused(f"{self.size} bytes", f"{about.st_size} bytes")
            if about.st_mtime_ns != self.mtime_ns:
                found = Library.of(self.path).identity
                if found != self.identity:
                    return self._refused(self.identity, found)
        except OSError as error:
            return self._refused("the file", error.strerror or str(error))
        return None

    def _refused(self, expected: str, got: str) -> Refusal:
        return Refusal(f"library {self.path}", expected, got)


def identity_at_once(path: str) -> str:
    """What tells a file from another build, without a look at all of it: libraries may be large.

    Returns:
        The linker's own hash, or size and time where it has made none: each installation has
        others.

    Raises:
        SnapshotError: It is not there any more, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found, about = _build_id(fd), os.fstat(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _gone(path, error.strerror) from error
    return f"build-id:{found}" if found else f"{about.st_size} bytes of {about.st_mtime_ns}"


def mapped_files(pid: int) -> list[str]:
    """The paths of the files that a process has mapped, as it sees them.

    Raises:
        SnapshotError: They cannot be read, or one of them has been deleted.
    """
    where = f"/proc/{pid}/maps"
    try:
        with open(where, encoding="utf-8", errors="surrogateescape") as maps:
            paths = sorted({path for line in maps if (path := _path_in(line))})
    except OSError as error:
        raise SnapshotError(
            "the mappings of a process cannot be read", where=where, got=error.strerror
        ) from error
    for path in paths:
        if path.endswith(_DELETED):
            raise _gone(path.removesuffix(_DELETED), "deleted")
    return paths


def _path_in(line: str) -> str:
    parts = line.rstrip("\n").split(None, 5)
    path = parts[5] if len(parts) > 5 else ""
    return path if path.startswith("/") and not path.startswith(_NO_FILES) else ""


def _gone(path: str, got: str | None) -> SnapshotError:
    return SnapshotError(
        "a file that the process has mapped is not there any more",
        where=path,
        got=got,
        hint="Start the process again, so that it maps what is there now.",
    )


def _identity(fd: int) -> str:
    found = _build_id(fd)
    if found:
        return f"build-id:{found}"
    import hashlib

    digest, at = hashlib.sha256(), 0
    while block := os.pread(fd, _BLOCK, at):
        digest.update(block)
        at += len(block)
    return f"sha256:{digest.hexdigest()}"


def _build_id(fd: int) -> str:
    """What the linker has noted in a 64-bit little-endian ELF file; empty where it has not.

    ELF-64 Object File Format, and the notes that `ld --build-id` writes.
    """
    head = os.pread(fd, 4096, 0)
    if len(head) < _HEADER.size or head[:6] != b"\x7fELF\x02\x01":
        return ""
    header = _HEADER.unpack_from(head)
    start, entry_bytes, entries = header[5], header[9], header[10]
    if entry_bytes != _PROGRAM.size:
        return ""
    table = os.pread(fd, entry_bytes * entries, start)
    for number in range(len(table) // entry_bytes):
        kind, _, offset, _, _, size, _, _ = _PROGRAM.unpack_from(table, number * entry_bytes)
        if kind == _PT_NOTE and (found := _build_id_in(os.pread(fd, min(size, _BLOCK), offset))):
            return found
    return ""


def _build_id_in(notes: bytes) -> str:
    at = 0
    while at + _NOTE.size <= len(notes):
        name_bytes, value_bytes, kind = _NOTE.unpack_from(notes, at)
        name = at + _NOTE.size
        value = name + (name_bytes + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[name : name + name_bytes] == b"GNU\0":
            return notes[value : value + value_bytes].hex()
        at = value + (value_bytes + 3 & ~3)
    return ""
