"""Compiled decode steps as files, and where they are kept for the next image.

A folder holds what was compiled for one `CodeShape`, and `step.json`, which says what that is and
has the hash of each file. Folders are named by a key of all that decides what comes out of the
compiler: the shape, this CPU's instructions, torch, and the sources. They are written elsewhere and
renamed when they are whole. Whoever could write to one could run code here, so what belongs to
somebody else, or can be written by others, is not looked at: each folder and file is opened first,
by no link, and what is open is checked. Files are made so that the umask does not matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import SnapshotError
from coldframe.runtime.compiled.cxx import compiler_version
from coldframe.runtime.engine.code_shape import MOST_KEYS, CodeShape
from coldframe.snapshot.machine import cpu_here, torch_version
from coldframe.snapshot.safe_folder import NEW, READ, is_safe

__all__ = [
    "CodeFile",
    "CodeFolder",
    "SizedFiles",
    "cache_root",
    "cached",
    "key_of",
    "open_root",
    "write_private",
]

VERSION = 2
_INDEX = "step.json"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SOURCES = (
    *("engine/traced.py", "engine/compiled.py"),
    *("compiled/compiler.py", "compiled/trial.py", "compiled/trial_plan.py"),
)
"""What the code is made of and tried with, and how."""


@dataclass(frozen=True, slots=True)
class CodeFile:
    """A shared library of a folder."""

    name: str
    sha256: str

    @classmethod
    def of(cls, folder: str, name: str) -> CodeFile:
        """A file as it is."""
        with _folder(folder) as fd:
            return cls(name, hashlib.sha256(_read(folder, name, fd)).hexdigest())


@dataclass(frozen=True, slots=True)
class SizedFiles:
    """Steps of one number of sequences.

    Args:
        sequences: How many.
        layer, logits: See `engine.traced`.
        speedup: How many times as fast as eager a step was, in the least favourable case.
        keys: Up to how many keys that is so.
    """

    sequences: int
    layer: CodeFile
    logits: CodeFile
    speedup: float
    keys: int = MOST_KEYS


@dataclass(frozen=True, slots=True)
class CodeFolder:
    """What was compiled for a shape, as far as it is of use.

    Args:
        path: The folder.
        shape: What it is for.
        sizes: From the smallest to the largest; none where eager is as fast.
        note: What came of it, for people.
    """

    path: str
    shape: CodeShape
    sizes: tuple[SizedFiles, ...]
    note: str

    @classmethod
    def read(cls, path: str) -> CodeFolder:
        """What `write` has written.

        Raises:
            SnapshotError: It is damaged, or not one that may be trusted.
        """
        index = os.path.join(path, _INDEX)
        with _folder(path) as fd:
            content = _read(path, _INDEX, fd)
        try:
            found = json.loads(content)
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']}")
            sizes = [
                SizedFiles(
                    int(size["sequences"]),
                    CodeFile(*size["layer"]),
                    CodeFile(*size["logits"]),
                    float(size["speedup"]),
                    int(size["keys"]),
                )
                for size in found["sizes"]
            ]
            return cls(path, CodeShape.from_json(found["shape"]), tuple(sizes), str(found["note"]))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(index, repr(error)) from error

    def write(self) -> None:
        """Writes the index; the files are there."""
        sizes: list[Mapping[str, Any]] = [
            {
                "sequences": size.sequences,
                "layer": [size.layer.name, size.layer.sha256],
                "logits": [size.logits.name, size.logits.sha256],
                "speedup": size.speedup,
                "keys": size.keys,
            }
            for size in self.sizes
        ]
        document = {
            "version": VERSION,
            "shape": self.shape.to_json(),
            "sizes": sizes,
            "note": self.note,
        }
        write_private(os.path.join(self.path, _INDEX), json.dumps(document).encode())

    def bytes_of(self, file: CodeFile) -> bytes:
        """A file's content, which is what was compiled.

        Raises:
            SnapshotError: It is not there, or not what it was.
        """
        if os.path.basename(file.name) != file.name:
            raise _damaged(self.path, f"a file called {file.name}")
        with _folder(self.path) as fd:
            content = _read(self.path, file.name, fd)
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            where = os.path.join(self.path, file.name)
            raise _damaged(where, f"sha256 {found}", file.sha256)
        return content


def cache_root() -> str:
    """This user's folder of such folders: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "coldframe", "compiled")


def key_of(shape: CodeShape, sequences: Sequence[int]) -> str:
    """The name of the folder for a shape here, for steps of so many sequences."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    what = {
        "version": VERSION,
        "shape": shape.to_json(),
        "sequences": list(sequences),
        "cpu": cpu_here(),
        "torch": torch_version(),
        "compiler": compiler_version(),
        "sources": [_hash_of_source(os.path.join(here, source)) for source in _SOURCES],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def cached(root: str, key: str, since: float = 0.0) -> CodeFolder | None:
    """What was compiled before; None where nothing was, or it is not what it was.

    Args:
        root: Where folders are kept.
        key: The folder's name.
        since: The Unix time from which on a step that was no faster than eager counts as such: a
            measurement may err, and would never be made again.
    """
    path = os.path.join(root, key)
    try:
        folder = CodeFolder.read(path)
        for size in folder.sizes:
            folder.bytes_of(size.layer)
            folder.bytes_of(size.logits)
        with _folder(path) as fd:
            if not folder.sizes and os.stat(_INDEX, dir_fd=fd).st_mtime < since:
                return None
            with contextlib.suppress(OSError):  # another's, such as root's
                os.utime(fd)  # it is in use: see `compiler`
    except (SnapshotError, OSError):
        return None
    return folder


def open_root(root: str) -> int:
    """Opens the folder of such folders.

    Raises:
        SnapshotError: It has no place of its own, cannot be opened, or others may write to it.
    """
    if not os.path.isabs(root):
        raise SnapshotError(
            "compiled code has no place to be kept in",
            where=root,
            expected="an absolute path",
            hint="Set XDG_CACHE_HOME, or HOME.",
        )
    return _open(root, root, None, _FOLDER)


def write_private(path: str, content: bytes) -> None:
    """Writes a new file that nobody else may write to, whatever the umask is."""
    with open(os.open(path, NEW, 0o600), "wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(content)


@contextlib.contextmanager
def _folder(path: str) -> Iterator[int]:
    """A folder and the one that it is in, both checked."""
    root = open_root(os.path.dirname(path))
    try:
        fd = _open(path, os.path.basename(path), root, _FOLDER)
    finally:
        os.close(root)
    try:
        yield fd
    finally:
        os.close(fd)


def _read(path: str, name: str, folder: int) -> bytes:
    where = os.path.join(path, name)
    fd = _open(where, name, folder, READ)
    try:
        with open(fd, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(where, error) from error


def _hash_of_source(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _open(where: str, name: str, within: int | None, flags: int) -> int:
    """Opens what nobody else may write to.

    Raises:
        SnapshotError: It cannot be opened, is a link, or others may.
    """
    try:
        fd = os.open(name, flags, dir_fd=within)
    except OSError as error:
        raise _unreadable(where, error) from error
    about = os.fstat(fd)
    if is_safe(about) and (stat.S_ISDIR(about.st_mode) or stat.S_ISREG(about.st_mode)):
        return fd
    os.close(fd)
    raise SnapshotError(
        "compiled code is where somebody else may write",
        where=where,
        expected="a folder of this user's own, that nobody else may write to",
        got=f"owner {about.st_uid}, mode {stat.filemode(about.st_mode)}",
        hint="Remove it; it is compiled again.",
    )


def _unreadable(where: str, error: OSError) -> SnapshotError:
    return SnapshotError("compiled code cannot be read", where=where, got=error.strerror)


def _damaged(where: str, got: str, expected: str | None = None) -> SnapshotError:
    return SnapshotError(
        "compiled code is damaged",
        where=where,
        expected=expected,
        got=got,
        hint="Remove the folder; it is compiled again.",
    )
