"""The C++ compiler of this machine: the command that runs it, and which one it is."""

from __future__ import annotations

import os
import shlex
import shutil

__all__ = ["compiler_command", "compiler_version", "has_compiler"]

_VERSION_S = 5.0


def compiler_command() -> list[str]:
    """The words of the command: CXX's, or g++."""
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["g++"]
    except ValueError:  # a quote without its end: no program is called so
        return [os.environ["CXX"]]


def has_compiler() -> bool:
    """Whether the command is one that is here."""
    return shutil.which(compiler_command()[0]) is not None


def compiler_version() -> str | None:
    """The first line that it says of itself; None where it says nothing."""
    if not has_compiler():
        return None
    import subprocess  # what only looks into a folder does without it

    try:
        said = subprocess.run(
            [*compiler_command(), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VERSION_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = said.stdout.decode(errors="replace").splitlines()
    return lines[0] if lines else None
