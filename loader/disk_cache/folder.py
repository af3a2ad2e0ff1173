"""The folders of a cache: locked by whoever works with them, for as long as its process lives.

A lock (flock) is on the folder itself and goes along when it is renamed. It ends with the process
that holds it; so what a dead process has left is told from what is at work.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from coldframe.loader.checkpoints.checkpoint import Checkpoint

__all__ = ["FORMAT", "Folder", "locked", "size_of", "touch", "write_note"]

FORMAT = 1
"""Of an entry: those of other versions are other entries."""

_NOTE = "entry.json"
_PATIENCE_S = 2.0
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """A folder of the cache that this process has locked.

    Args:
        parent: The cache's directory.
        name: Its name in it.
        fd: A descriptor of it, which has the lock.
    """

    def __init__(self, parent: str, name: str, fd: int) -> None:
        self.parent = parent
        self.name = name
        self.fd = fd

    @property
    def path(self) -> str:
        return os.path.join(self.parent, self.name)

    @property
    def nbytes(self) -> int:
        """Its size (see `size_of`)."""
        return size_of(self.path)

    def rename(self, name: str) -> None:
        """Gives it another name; the lock goes along."""
        os.rename(self.path, os.path.join(self.parent, name))
        self.name = name

    def remove(self) -> None:
        """Removes it and all that is in it, as far as that is possible."""
        import shutil  # slow to import, and not needed by a start

        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Ends the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @staticmethod
    def lock(parent: str, name: str, *, shared: bool = False) -> Folder | None:
        """A folder with a lock on it; None where others have theirs, or it has gone."""
        try:
            fd = os.open(os.path.join(parent, name), _FOLDER)
        except OSError:
            return None
        folder = Folder(parent, name, fd)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # Between the two it may have been renamed, and removed.
            if os.path.samestat(os.fstat(fd), os.stat(folder.path)):
                return folder
        except OSError:  # a file system without locks cannot be told from one that is in use
            pass
        folder.close()
        return None

    def share(self) -> None:
        """Lets others read it, and only that."""
        fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def locked(path: str) -> Iterator[int]:
    """Nobody else renames anything in a directory; gives its descriptor. For moments only.

    Raises:
        OSError: It cannot be locked, or another process does not let go of it.
    """
    fd = os.open(path, _FOLDER)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # A cold start must not hang because another process was stopped.
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "it stays locked") from None
                time.sleep(0.005)
        yield fd
    finally:
        os.close(fd)


def touch(fd: int) -> None:
    """Marks a file or folder as used now."""
    now = time.time_ns()  # by itself the kernel would take the time of its last tick
    os.utime(fd, ns=(now, now))


def write_note(folder: int, checkpoint: Checkpoint, nbytes: int) -> None:
    """Says in a folder what it will hold: for `size_of`, and for people.

    Args:
        folder: Its descriptor.
        checkpoint: The checkpoint.
        nbytes: The bytes of its shards.
    """
    note = {
        "version": FORMAT,
        "uri": checkpoint.path,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "bytes": nbytes,
        "shards": [[shard.name, shard.size, shard.version] for shard in checkpoint.shards],
    }
    fd = os.open(_NOTE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(note, file, indent=1)


def size_of(path: str) -> int:
    """The bytes in a folder, or where that is more those that its note says will be there."""
    there = planned = 0
    try:
        for item in os.scandir(path):
            there += item.stat(follow_symlinks=False).st_size
        with open(os.path.join(path, _NOTE), "rb") as file:
            planned = int(json.load(file)["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # half removed, or hardly begun: what was counted is what there is
    return max(there, planned)
