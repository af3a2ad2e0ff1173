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
    """Makes installed packages importable where they are not; a few milliseconds, once."""
    with _lock:
        if sys.flags.no_site and not hasattr(sys, "_coldframe_site"):
            import site

            site.main()
            sys._coldframe_site = True  # type: ignore[attr-defined]
