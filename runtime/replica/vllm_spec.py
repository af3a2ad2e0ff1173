"""What a vLLM engine among a replica's workers is to be: bare, as every worker imports it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coldframe.runtime.engine.spec import ModelSpec

__all__ = ["BLOCK_TOKENS", "VllmOptions", "longest_in"]

BLOCK_TOKENS = 128
"""Tokens in the largest of vLLM's KV blocks: so many may lie empty behind a sequence."""


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

    def longest(self, spec: ModelSpec) -> int | None:
        """The longest sequence that the engine will take, in tokens; None where it decides itself.

        Args:
            spec: The model's.
        """
        asked = dict(self.args).get("max_model_len")
        if type(asked) is int and asked > 0:
            return asked
        if self.kv_bytes is None or not spec.native:
            return None
        return longest_in(spec, self.kv_bytes)


def longest_in(spec: ModelSpec, kv_bytes: int) -> int:
    """The longest sequence that an engine takes, in tokens, where nobody says another number.

    Args:
        spec: The model's, one that the native engine runs.
        kv_bytes: Memory for the engine's own KV.
    """
    per_token = spec.kv_block_bytes(spec.dtype_bytes, 1)
    # What one sequence may need, and what of a block lies empty behind it.
    return min(spec.context_length, kv_bytes // per_token - BLOCK_TOKENS)
