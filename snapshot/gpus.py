"""Which GPUs there are and what drives them, by what the kernel's module says of itself.

To ask the driver's library takes its start and a context, as long as all else that a restore does.
Whether an image fits has to be known before that, so it is read where the module shows it.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

__all__ = ["FOLDER", "Gpus"]

FOLDER = "COLDFRAME_NVIDIA_PROC"
"""Names a folder that says what the module's own would, as in a container that hides that one."""

_FOLDER = "/proc/driver/nvidia"
# "NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug ...", or since the sources are open
# "NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build ...".
_DRIVER = re.compile(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\b")
_FIELD = re.compile(r"^([^:\n]+):[ \t]*(.*?)[ \t]*$", re.MULTILINE)


class Gpus(NamedTuple):
    """The GPUs that the kernel's module shows here.

    Attributes:
        driver: The module's version; None where there is none, or it cannot be seen.
        names: What the maker calls each of them, sorted by their places on the bus.
    """

    driver: str | None
    names: tuple[str, ...]

    @property
    def name(self) -> str | None:
        """What they are called: each kind's name, and how many there are where it is not one.

        A context comes back to as many of each as there were.

        Which of them a process takes for its first is settled by the driver's library alone.
        """
        each = {name: self.names.count(name) for name in sorted(self.names)}
        told = (name if count == 1 else f"{count} x {name}" for name, count in each.items())
        return ", ".join(told) or None

    @staticmethod
    def here() -> Gpus:
        """Those of this machine, or container; a few files are read."""
        folder = os.environ.get(FOLDER) or _FOLDER
        version = _DRIVER.search(_read(os.path.join(folder, "version")))
        each = os.path.join(folder, "gpus")
        try:
            places = sorted(os.listdir(each))
        except OSError:
            places = []
        found = [dict(_FIELD.findall(_read(os.path.join(each, p, "information")))) for p in places]
        names = tuple(gpu["Model"] for gpu in found if "Model" in gpu)
        return Gpus(version and version[1], names)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
