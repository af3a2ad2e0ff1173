"""How `coldframe` is called on this machine, as a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["coldframe_command"]


def coldframe_command() -> list[str]:
    """The words before its arguments: its script, or where it is not installed, without one."""
    script = Path(sys.executable).parent / "coldframe"
    if script.exists():
        return [str(script)]
    # As the script does it; -P, since nothing in the working directory is meant.
    code = "import sys; from coldframe.runtime.cli import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code]
