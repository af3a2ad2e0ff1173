"""Where archives of graphs are kept: a folder with a file for each model and kind of GPU.

Written whole or not at all, and taken only where nobody else can have written it: see
`safe_folder.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time

from coldframe.loader.errors import NoImage, SnapshotError
from coldframe.snapshot.graph_file import GraphArchive, check, decode, encode
from coldframe.snapshot.graph_fingerprint import GraphFingerprint
from coldframe.snapshot.safe_folder import (
    READ,
    TEMPORARY,
    check_safe,
    discard,
    failed,
    open_folder,
    write_file,
)

__all__ = ["GraphStore", "name_of"]

_ENDING = ".graphs"
_NAME = re.compile(r"[0-9a-f]{32}\.graphs")
_MOST_BYTES = 1 << 29
_KEPT = 16
_LEFT_BEHIND_S = 3600.0


class GraphStore:
    """Archives in a folder, which need not be there.

    Args:
        root: Its path.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def path(self, fingerprint: GraphFingerprint) -> str:
        """Where the archive for a model on a kind of GPU is; another driver's takes its place."""
        return os.path.join(self.root, name_of(fingerprint))

    def read(self, here: GraphFingerprint) -> GraphArchive:
        """The archive of this model.

        Args:
            here: What there is here.

        Raises:
            NoImage: There is none, or it does not fit; the error says what of it.
            ImageDamaged: It is not what was written.
            SnapshotError: Others could have written it, or it cannot be read.
        """
        path = self.path(here)
        try:
            folder = open_folder(self.root, None, strict=True)
            try:
                raw = _content(name_of(here), folder, path)
            finally:
                os.close(folder)
        except FileNotFoundError:
            raise NoImage(
                "there is no archive of graphs for this model",
                where=path,
                hint="Nothing is lost: one is written once the graphs have been captured.",
            ) from None
        except OSError as error:
            raise failed("an archive of graphs cannot be read", path, error) from error
        return decode(raw, path, here)

    def write(self, archive: GraphArchive) -> str:
        """Keeps an archive in place of an older one.

        Returns:
            Its path.

        Raises:
            SnapshotError: It cannot be written, or others can write the folder.
        """
        return self.publish(name_of(archive.fingerprint), encode(archive))

    def publish(self, name: str, raw: bytes) -> str:
        """Keeps an archive that another process has encoded; see `write`.

        Args:
            name: What it calls it: see `name_of`.
            raw: The archive.

        Raises:
            SnapshotError: See `write`; or it is none, or not called like one.
        """
        path = self._named(name)
        check(raw, path)
        try:
            _make(self.root)
            folder = open_folder(self.root, None, strict=True)
            try:
                write_file(name, raw, folder)
                _prune(folder)
            finally:
                os.close(folder)
        except OSError as error:
            what = "an archive of graphs cannot be written"
            raise failed(what, path, error, len(raw)) from error
        return path

    def remove(self, name: str) -> None:
        """Gives up an archive that is of no use, if it is there.

        Raises:
            SnapshotError: It cannot be removed, or is not called like one.
        """
        path = self._named(name)
        try:
            folder = open_folder(self.root, None, strict=True)
            try:
                os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise failed("an archive of graphs cannot be removed", path, error) from error

    def _named(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise SnapshotError(
                "this is no name of an archive of graphs", got=name, expected=_NAME.pattern
            )
        return os.path.join(self.root, name)


def name_of(fingerprint: GraphFingerprint) -> str:
    """What the archive for a model on a kind of GPU is called."""
    what = f"{fingerprint.model}\0{fingerprint.gpu}\0{fingerprint.capability}"
    return hashlib.sha256(what.encode()).hexdigest()[:32] + _ENDING


def _make(root: str) -> None:
    """A folder that only we may enter, in one that only we may, where there is neither."""
    for path in (os.path.dirname(root), root):
        os.makedirs(path, 0o700, exist_ok=True)


def _content(name: str, folder: int, path: str) -> bytes:
    fd = os.open(name, READ, dir_fd=folder)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise SnapshotError(
                "this is no archive of graphs",
                where=path,
                expected=f"a file of at most {_MOST_BYTES:,} bytes",
                got=f"{stat.filemode(status.st_mode)}, {status.st_size:,} bytes",
            )
        check_safe(status, path, "a file")
        return file.read()


def _prune(folder: int) -> None:
    """Removes the oldest where there are many, and what writers have left that died."""
    found, now = [], time.time()
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):  # another has removed it
            written = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime
            if name.endswith(_ENDING):
                found.append((written, name))
            elif name.startswith(TEMPORARY) and now - written > _LEFT_BEHIND_S:
                discard(name, folder)
    for _, name in sorted(found)[:-_KEPT]:
        discard(name, folder)
