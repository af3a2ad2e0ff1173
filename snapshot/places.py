"""Where images and resident templates are found, looked up in microseconds."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress

__all__ = [
    "KEY_DIGITS",
    "default_store",
    "expanded",
    "images_are_there",
    "read_ahead",
    "template_directory",
    "templates",
]

KEY_DIGITS = 16
"""How many digits of its model's key a template's socket is named by."""
_AHEAD_BYTES = 64 << 20
"""Images that take more than this are not read before it is known which of them is wanted."""
_AHEAD_FILES = 64


def default_store() -> str:
    """The store of this user: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "coldframe", "snapshots")


def expanded(store: str) -> str:
    """A store as it was written, with ~ made what it stands for, as no shell has done it."""
    return store if "://" in store else os.path.expanduser(store)


def images_are_there(store: str) -> bool:
    """Whether a store can have images: False only where it surely has none."""
    if "://" in store:
        return True
    try:
        with os.scandir(os.path.join(store, "manifests")) as entries:
            return any(entry.name.endswith(".json") for entry in entries)
    except OSError:
        return False


def read_ahead(store: str) -> None:
    """Asks the kernel for what a start will read of a store on a disk, and does not wait for it.

    A restore reads a few small files one after the other, and then an image that is small beside
    the weights; asked for later, each of them stands in line behind weights that fill the disk's
    queue. Manifests are read ahead in any case, images where all of them together are small: of
    many the one that is wanted is not known yet.
    """
    if "://" in store:
        return
    manifests, objects = (list(_sizes(os.path.join(store, n))) for n in ("manifests", "objects"))
    ahead = manifests
    if sum(size for _, size in objects) <= _AHEAD_BYTES:
        ahead = manifests + objects
    for path, _ in ahead[:_AHEAD_FILES]:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)


def _sizes(folder: str) -> Iterator[tuple[str, int]]:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            yield entry.path, entry.stat(follow_symlinks=False).st_size


def template_directory() -> str:
    """Where this user's resident templates have their sockets."""
    base = os.environ.get("COLDFRAME_RUN_DIR") or os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    return os.path.join(base, f"coldframe-templates-{os.getuid()}")


def templates() -> list[str]:
    """The sockets of the templates that may be there, the newest first.

    What lies in a directory that others may write, in /tmp for one, is none of ours.
    """
    directory = template_directory()
    try:
        status = os.lstat(directory)
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            return []
        with os.scandir(directory) as entries:
            found = [(entry.stat().st_mtime_ns, entry.path) for entry in entries]
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True)]
