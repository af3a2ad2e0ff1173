"""Folders of a rehearsal's own, which go with it: at once, or at the next one's beginning.

A lock says that one is in use; the kernel drops it with its owner, whatever that dies of.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PREFIX", "scratch"]

PREFIX = "coldframe-scale-"
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def scratch(base: str, prefix: str = PREFIX) -> Iterator[str]:
    """An empty folder while the context lasts; those whose owners are dead are removed before.

    Args:
        base: Where.
        prefix: Of its name, and of whose leftovers go.

    Raises:
        OSError: It cannot be made.
    """
    sweep(base, prefix)
    path, lock = _make(base, prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def sweep(base: str, prefix: str = PREFIX) -> None:
    """Removes this user's folders that nobody uses any more."""
    for entry in os.scandir(base):
        if not entry.name.startswith(prefix):
            continue
        try:
            fd = os.open(entry.path, _OPEN)
        except OSError:  # no folder of ours, or somebody else swept it
            continue
        try:
            if os.fstat(fd).st_uid == os.getuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path, ignore_errors=True)
        except BlockingIOError:  # in use
            pass
        finally:
            os.close(fd)


def _make(base: str, prefix: str) -> tuple[str, int]:
    while True:
        path = tempfile.mkdtemp(prefix=prefix, dir=base)
        try:
            fd = os.open(path, _OPEN)
        except FileNotFoundError:  # swept before it was locked
            continue
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.path.exists(path):
            return path, fd
        os.close(fd)
