"""What a vLLM engine among a replica's workers is to be: bare, as every worker imports it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["VllmOptions"]


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """A vLLM engine among a replica's workers.

    Args:
        python: The interpreter that has vLLM, and this package.
        device: Where it computes; None for where the replica does.
        alone: Whether nobody else decodes. Else native workers do until it is up.
        move: Whether what native workers decode then moves over, with its KV.
        kv_bytes: Memory of its own for KV; None takes what the native KV has.
        args: More arguments of its `EngineArgs`.
    """

    python: str = sys.executable
    device: str | None = None
    alone: bool = False
    move: bool = False
    kv_bytes: int | None = None
    args: tuple[tuple[str, Any], ...] = ()
