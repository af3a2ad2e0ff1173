"""A folder that says of GPUs what NVIDIA's module of the kernel says in /proc/driver/nvidia."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["kernel_says"]

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\n"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (a@b)  Thu\n"
    "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n"
)


def kernel_says(
    folder: Path,
    names: Sequence[str] = ("Emulated GPU",),
    driver: str = "580.1.2",
    line: str = OPEN,
) -> Path:
    """Writes such a folder, over one that is there.

    Args:
        folder: Where.
        names: Of each GPU.
        driver: The module's version.
        line: How it writes that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version").write_text(line.format(driver))
    for number, name in enumerate(names):
        place = folder / "gpus" / f"0000:{number:02x}:00.0"
        place.mkdir(parents=True, exist_ok=True)
        (place / "information").write_text(
            f"Model: \t\t {name}\nIRQ:   \t\t 33\nGPU UUID: \t GPU-{number:08x}\n"
            f"Bus Location: \t {place.name}\nDevice Minor: \t {number}\nGPU Excluded:\t No\n"
        )
    return folder
