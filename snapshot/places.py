"""Where images and resident templates are found, looked up in microseconds."""

from __future__ import annotations

import os

__all__ = ["default_store", "images_are_there", "template_directory", "templates"]


def default_store() -> str:
    """The store of this user: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "coldframe", "snapshots")


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
    """The sockets of the templates that may be there, the newest first."""
    try:
        with os.scandir(template_directory()) as entries:
            found = [(entry.stat().st_mtime_ns, entry.path) for entry in entries]
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True)]
