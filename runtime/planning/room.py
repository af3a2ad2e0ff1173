"""What a rehearsal may take of a machine on which a replica may be serving."""

from __future__ import annotations

import os
from pathlib import Path

from coldframe.loader.cgroup import memory_available
from coldframe.loader.errors import PlatformError
from coldframe.runtime.units import human_bytes

__all__ = ["PROCESSES_BYTES", "rehearsal_room"]

PROCESSES_BYTES = 800 << 20
"""What the rehearsed replica's processes take for themselves at most (785 MB of PSS seen)."""
_COPIES = 3
"""Of a scale model: its file, which a tmpfs has in memory, an arena, and what is under way."""


def rehearsal_room(directory: str, root: str | Path = "/") -> int:
    """Bytes that a scale model may take, of disk and of memory.

    Args:
        directory: Where it would lie.
        root: Where `/proc` and the cgroup mounts are looked for.

    Raises:
        PlatformError: Not even its processes have room: the kernel might end what serves here.
        OSError: There is no such directory.
    """
    status = os.statvfs(directory)
    available = memory_available(root)
    spare = available - PROCESSES_BYTES
    if spare <= 0:
        raise PlatformError(
            "a rehearsal might take memory from what runs here",
            expected=f"more than {human_bytes(PROCESSES_BYTES)} available",
            got=human_bytes(available),
            hint="Raise the memory limit, or plan on a machine where nothing serves.",
        )
    return min(status.f_bavail * status.f_frsize // 2, spare // _COPIES)
