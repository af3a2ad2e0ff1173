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

    A process that was started by another one of ours is told by it where they are; any other has
    to go looking.
    """
    with _lock:
        known: list[str] | None = getattr(sys, "coldframe_packages", None)
        if known is not None:
            sys.path += [path for path in known if path not in sys.path]
        elif sys.flags.no_site and "site" not in sys.modules:
            import site

            site.main()
