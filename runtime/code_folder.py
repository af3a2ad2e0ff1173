"""Compiled decode steps as files, and where they are kept for the next image.

A folder holds what was compiled for one `CodeShape`, and `step.json`, which says what that is and
has the hash of each file. Folders are named by a key of all that decides what comes out of the
compiler: the shape, this CPU's instructions, torch, and the sources. They are written elsewhere and
renamed when they are whole. Whoever could write to one could run code here, so what belongs to
somebody else, or can be written by others, is not looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import SnapshotError
from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.snapshot.machine import cpu_here, torch_version

__all__ = ["CodeFile", "CodeFolder", "SizedFiles", "cache_root", "cached", "key_of"]

VERSION = 1
_INDEX = "step.json"
_SOURCES = ("engine/traced.py", "compiler.py")
"""What the code is made of, and how."""


@dataclass(frozen=True, slots=True)
class CodeFile:
    """A shared library of a folder."""

    name: str
    sha256: str

    @classmethod
    def of(cls, folder: str, name: str) -> CodeFile:
        """A file as it is."""
        return cls(name, hashlib.sha256(_read(os.path.join(folder, name))).hexdigest())


@dataclass(frozen=True, slots=True)
class SizedFiles:
    """Steps of one number of sequences.

    Args:
        sequences: How many.
        layer, logits: See `engine.traced`.
        speedup: How many times as fast as eager a step was, in the least favourable case.
    """

    sequences: int
    layer: CodeFile
    logits: CodeFile
    speedup: float


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
        for place in (path, index):
            _check_owner(place)
        try:
            found = json.loads(_read(index))
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']}")
            sizes = [
                SizedFiles(
                    int(size["sequences"]),
                    CodeFile(*size["layer"]),
                    CodeFile(*size["logits"]),
                    float(size["speedup"]),
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
            }
            for size in self.sizes
        ]
        document = {
            "version": VERSION,
            "shape": self.shape.to_json(),
            "sizes": sizes,
            "note": self.note,
        }
        with open(os.path.join(self.path, _INDEX), "w") as file:
            json.dump(document, file)

    def bytes_of(self, file: CodeFile) -> bytes:
        """A file's content, which is what was compiled.

        Raises:
            SnapshotError: It is not there, or not what it was.
        """
        if os.path.basename(file.name) != file.name:
            raise _damaged(self.path, f"a file called {file.name}")
        path = os.path.join(self.path, file.name)
        content = _read(path)
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            raise _damaged(path, f"sha256 {found}", file.sha256)
        return content


def cache_root() -> str:
    """This user's folder of such folders: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "coldframe", "compiled")


def key_of(shape: CodeShape, sequences: Sequence[int]) -> str:
    """The name of the folder for a shape here, for steps of so many sequences."""
    here = os.path.dirname(os.path.abspath(__file__))
    what = {
        "version": VERSION,
        "shape": shape.to_json(),
        "sequences": list(sequences),
        "cpu": cpu_here(),
        "torch": torch_version(),
        "sources": [
            hashlib.sha256(_read(os.path.join(here, source))).hexdigest() for source in _SOURCES
        ],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def cached(root: str, key: str) -> CodeFolder | None:
    """What was compiled before; None where nothing was, or it is not what it was."""
    try:
        folder = CodeFolder.read(os.path.join(root, key))
        for size in folder.sizes:
            folder.bytes_of(size.layer)
            folder.bytes_of(size.logits)
        return folder
    except SnapshotError:
        return None


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SnapshotError(
            "compiled code cannot be read", where=path, got=error.strerror
        ) from error


def _check_owner(path: str) -> None:
    try:
        about = os.lstat(path)
    except OSError as error:
        raise SnapshotError(
            "compiled code cannot be read", where=path, got=error.strerror
        ) from error
    others = about.st_uid not in (0, os.getuid()) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others or stat.S_ISLNK(about.st_mode):
        raise SnapshotError(
            "compiled code is where somebody else may write",
            where=path,
            expected="a folder of this user's own, that nobody else may write to",
            got=f"owner {about.st_uid}, mode {stat.filemode(about.st_mode)}",
            hint="Remove it; it is compiled again.",
        )


def _damaged(where: str, got: str, expected: str | None = None) -> SnapshotError:
    return SnapshotError(
        "compiled code is damaged",
        where=where,
        expected=expected,
        got=got,
        hint="Remove the folder; it is compiled again.",
    )
