"""What a process has left of a GPU's device files once its context is off the GPU.

CRIU cannot write a device's descriptor or mapping, nor say whose it is. So it is looked for before
CRIU is called, and refused by its name.
"""

from __future__ import annotations

import os
from pathlib import Path

from coldframe.loader.errors import SnapshotError

__all__ = ["DEVICES", "check_nothing_left_open", "left_open"]

DEVICES = "/dev/nvidia"
"""What the names of such files begin with."""


def left_open(pid: int) -> tuple[str, ...]:
    """Descriptors and mappings of device files that a process has: their names, sorted.

    Args:
        pid: The process; it stands still.

    Raises:
        SnapshotError: It is gone, or another's.
    """
    found = set[str]()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = os.readlink(link)
            except FileNotFoundError:  # closed meanwhile
                continue
            if name.startswith(DEVICES):
                found.add(name)
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            name = line.split(maxsplit=5)[-1]
            if name.startswith(DEVICES):
                found.add(f"{name}, mapped")
    except OSError as error:
        raise SnapshotError(
            "it cannot be seen what a process has open",
            where=f"process {pid}",
            got=error.strerror,
        ) from error
    return tuple(sorted(found))


def check_nothing_left_open(pid: int) -> None:
    """Whether CRIU can write a process, as far as the GPU's device files go.

    Raises:
        SnapshotError: It has some; they are named.
    """
    found = left_open(pid)
    if found:
        raise SnapshotError(
            "a process that is off its GPU has files of the GPU's left, which CRIU cannot write",
            where=f"process {pid}",
            expected=f"nothing of {DEVICES}*",
            got=", ".join(found),
            hint="Another version of the driver may close them. Workers start fresh.",
        )
