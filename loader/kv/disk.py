"""KV blocks in a directory: one file each, found by its key, the least recently used ones deleted.

    DIR/<model and format, hashed>/<first two digits of the key>/<key>

There is no index: a block is there if its file is, so that several replicas share a directory, and
a start reads nothing that it does not need. A file comes by a rename, whole, and may go any time.
Its time of change says when it was used last. Of blocks used together the first is the youngest,
so that what continues a block is deleted before it.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b

from coldframe.loader.errors import PlatformError
from coldframe.loader.kv.file import HEADER_BYTES, VERSION, read_block, write_block

__all__ = ["KvDisk", "is_key", "prepare_directory"]

_KEY = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"[0-9a-f]{2}")
_UNFINISHED = ".new"
_LOW = 0.9
"""Share of what it may have to which a directory is brought down that could come to have more."""
_LOOK_AGAIN = 16
"""After this part of what it may have has been written, it is looked at what others have."""
_OF_DISK = 0.95
"""Of what it has and what is free it may have this share: others write to the disk as well."""
_PAUSE_S = 0.001


def is_key(text: str) -> bool:
    """Whether it can name a file."""
    return _KEY.fullmatch(text) is not None


def prepare_directory(path: str) -> None:
    """Makes a directory for KV where there is none, for this user alone.

    Raises:
        PlatformError: It cannot be made or written to.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it may not be written to")
        # Root may do all, and a file system that may only be read shows at the first write.
        probe = os.path.join(path, f"{os.urandom(8).hex()}{_UNFINISHED}")
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.unlink(probe)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return  # what is there can be read, and there may be room later
        raise PlatformError(
            "the KV store's directory cannot be used",
            where=path,
            got=error.strerror,
            hint="Give --kv-store a directory that this user can write to.",
        ) from error


class KvDisk:
    """The files of one model's KV, and room for them among those of others.

    `read` may be called by several threads at once, all else by one.

    Args:
        root: The directory; made where there is none, once there is something to write.
        identity: What tells this model's KV from all other.
        max_bytes: What all files in the directory may take together.
    """

    def __init__(self, root: str, identity: str, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.forgotten_s = 600.0
        """After so long a file that is still being written is one that a dead process has left."""
        self.nbytes = 0
        """What all files took when it was looked last, and what has been written since."""
        name = blake2b(f"{VERSION}\0{identity}".encode(), digest_size=16).hexdigest()
        self._folder = os.path.join(root, name)
        # Other replicas may be in other PID namespaces.
        self._names = f"{os.urandom(8).hex()}-"
        self._numbers = itertools.count()
        self._until_look = 0
        self._step = max_bytes // _LOOK_AGAIN
        """After so many bytes it is looked at what others have."""
        self._ours = False

    def read(self, key: str, into: memoryview, used_ns: int) -> bool | None:
        """Reads a block to its place; see `read_block`.

        Returns:
            Whether it is there; None where there is a file that is not that block. It is gone now.

        Raises:
            OSError: It is there and cannot be read.
        """
        path = self._path(key)
        try:
            self._check()
            if read_block(path, key, into, used_ns):
                return True
        except FileNotFoundError:
            return False
        with suppress(OSError):
            os.unlink(path)
        return None

    def touch(self, key: str, nbytes: int, used_ns: int) -> bool:
        """Marks a block as used. Whether it is there, as far as its size tells.

        Raises:
            OSError: It cannot be told.
        """
        path = self._path(key)
        try:
            self._check()
            status = os.stat(path, follow_symlinks=False)
            # A machine that lost its power may have left empty files.
            if not stat.S_ISREG(status.st_mode) or status.st_size != HEADER_BYTES + nbytes:
                return False
            os.utime(path, ns=(used_ns, used_ns), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def write(self, key: str, block: memoryview, used_ns: int) -> None:
        """Writes a block; one that is there is replaced.

        Raises:
            OSError: It cannot be written. Nothing of it is left.
        """
        path = self._path(key)
        folder = os.path.dirname(path)
        unfinished = os.path.join(folder, f"{self._names}{next(self._numbers)}{_UNFINISHED}")
        try:
            self._write(unfinished, path, key, block, used_ns)
        except FileNotFoundError:  # the folder is not there yet, or no more
            for place in (self.root, self._folder, folder):
                with suppress(FileExistsError):
                    os.mkdir(place, 0o700)
            self._write(unfinished, path, key, block, used_ns)
        size = HEADER_BYTES + len(block)
        self.nbytes += size
        self._until_look -= size

    def _write(self, unfinished: str, path: str, key: str, block: memoryview, used_ns: int) -> None:
        try:
            write_block(unfinished, key, block, used_ns)
            os.rename(unfinished, path)
        except OSError:
            with suppress(OSError):
                os.unlink(unfinished)
            raise

    @property
    def may_sweep(self) -> bool:
        """Whether it is time for `sweep`, if there is time."""
        return self._until_look <= 0

    @property
    def must_sweep(self) -> bool:
        """Whether `sweep` cannot wait any longer."""
        return self._until_look <= -self._step

    def sweep(self, urgent: Callable[[], bool] = lambda: False) -> None:
        """Sees how much there is, and deletes what was used longest ago where it is too much.

        Args:
            urgent: Whether there is something better to do: then this is left for another time.

        Raises:
            OSError: The directory cannot be read.
        """
        self._until_look = self._step
        files: list[tuple[int, int, str]] = []
        for folder in _entries(self.root, _FOLDER):
            for part in _entries(folder.path, _PART):
                if urgent():
                    return
                files += self._files(part.path)
                time.sleep(_PAUSE_S)  # what goes on beside this is more urgent
        self.nbytes = sum(size for _, size, _ in files)
        most = self._most()
        self._until_look = self._step = most // _LOOK_AGAIN
        if self.nbytes + self._step <= most:
            return
        files.sort()
        for _, size, path in files:
            if self.nbytes <= most * _LOW:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            self.nbytes -= size

    def _most(self) -> int:
        """What there may be: less than was asked for where the disk has no room for that."""
        try:
            status = os.statvfs(self.root)
        except FileNotFoundError:
            return self.max_bytes
        room = self.nbytes + status.f_bavail * status.f_frsize
        return min(self.max_bytes, int(room * _OF_DISK))

    def _files(self, folder: str) -> list[tuple[int, int, str]]:
        """The blocks in a folder: when used last, size, and path."""
        found, late = [], time.time() - self.forgotten_s
        for entry in _entries(folder):
            with suppress(FileNotFoundError):  # somebody else was faster
                status = entry.stat(follow_symlinks=False)
                if _KEY.fullmatch(entry.name):
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
                elif entry.name.endswith(_UNFINISHED) and status.st_ctime < late:
                    os.unlink(entry.path)
        return found

    def _check(self) -> None:
        """Looks, once, whether nobody else could have put files into the folder.

        Raises:
            OSError: It is not there, or somebody could.
        """
        if self._ours:
            return
        status = os.stat(self._folder, follow_symlinks=False)
        # To a file server root may be another user: then the directory is that one's as well.
        ours = status.st_uid in (os.geteuid(), os.stat(self.root).st_uid)
        if not ours or not stat.S_ISDIR(status.st_mode) or status.st_mode & 0o022:
            raise PermissionError(errno.EACCES, "others may write to its folder")
        self._ours = True

    def _path(self, key: str) -> str:
        return os.path.join(self._folder, key[:2], key)


def _entries(folder: str, kind: re.Pattern[str] | None = None) -> list[os.DirEntry[str]]:
    """What is in a folder, as far as its names are of a kind; nothing where it is gone."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if kind is None or kind.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
