"""What vLLM leaves in the temporary directory of its processes."""

from __future__ import annotations

import re
from pathlib import Path

_NAMES = re.compile(r"vllm_dist_[0-9a-f]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Files by which processes find each other, and sockets between them."""


def leftovers(folder: Path) -> list[str]:
    """Their names."""
    return sorted(path.name for path in folder.iterdir() if _NAMES.fullmatch(path.name))
