"""Whether workers can be frozen and restored here, as JSON.

Run as a process of its own: to know, it takes namespaces as a restore does, and keeps them.
"""

from __future__ import annotations

import json
import os
from typing import Any

from coldframe.loader.errors import ColdframeError
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.linux import own_mounts

__all__ = ["ENTRY", "main", "snapshot_report"]

ENTRY = "from coldframe.snapshot.check import main; main(3)"
"""What an interpreter runs to be that process."""


def snapshot_report() -> dict[str, Any]:
    """Looks for CRIU and takes the rights that it needs; this process is another one then.

    Returns:
        `criu`, its path and `version`, or None; `namespaces`, how it gets its rights, `root` or
        `user`, or None; `error`, what is missing, or None.
    """
    found: dict[str, Any] = {"criu": None, "version": None, "namespaces": None, "error": None}
    try:
        criu = Criu.find()
        found |= {"criu": criu.path, "version": criu.version}
        user = own_mounts()
        found["namespaces"] = "user" if user else "root"
        criu.check(user=user)
    except ColdframeError as error:
        found["error"] = error.to_wire()
    return found


def main(fd: int) -> None:
    """The process's entry: writes the report to a descriptor."""
    with os.fdopen(fd, "w") as file:
        json.dump(snapshot_report(), file)
