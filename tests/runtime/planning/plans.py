"""`coldframe plan` as a process of its own, with rates of its own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.runtime.snapshots import COLDFRAME
from tests.support import without_settings

__all__ = ["plan"]


def plan(cache: Path, *arguments: object, **env: str) -> dict[str, Any]:
    """The document of a plan.

    Args:
        cache: Where its rates and scale models go.
        arguments: The command's.
        env: Further variables of its environment.
    """
    cache.mkdir(exist_ok=True)
    changed = {**without_settings(), "XDG_CACHE_HOME": str(cache), "TMPDIR": str(cache), **env}
    done = subprocess.run(
        [COLDFRAME, "plan", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env=changed,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document
