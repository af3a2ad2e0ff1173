"""Installed packages, for a process that was started without knowing of any.

The memory service starts bare (`python -S`), because looking for packages costs it as much time
as all else that it does before its first read. What needs one - boto3 for S3, a hash for a seal -
asks for it here first.
"""

from __future__ import annotations

import sys
import threading

__all__ = ["add_site_packages"]

_lock = threading.Lock()


def add_site_packages() -> None:
    """Makes installed packages importable where they are not.

    A process that was started by another one of ours is told by it where they are.
    """
    with _lock:
        known: list[str] = getattr(sys, "coldframe_packages", [])
        sys.path += [path for path in known if path not in sys.path]
