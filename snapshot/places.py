"""Where images and resident templates are found, looked up in microseconds."""

from __future__ import annotations

import os
import stat

__all__ = [
    "KEY_DIGITS",
    "default_store",
    "expanded",
    "images_are_there",
    "template_directory",
    "templates",
]

KEY_DIGITS = 16
"""How many digits of its model's key a template's socket is named by."""


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
