"""What the front tells of a model so that its gateway can register it with Dynamo."""

from __future__ import annotations

from typing import Any

from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.options import BLOCK_TOKENS

__all__ = ["registration_of"]


def registration_of(model: Supervisor) -> dict[str, Any]:
    """Where a model's small files are, and how much KV there is.

    Args:
        model: One whose config is known.

    Returns:
        `directory`; `lasting`, whether it outlives the replica; `block_tokens`; `kv_blocks`, None
        where that is not known; `soon`, whether it will be in a moment, as with a GPU.
    """
    facts, replica = model.model, model.replica
    kv_bytes = None if replica is None else replica.kv_bytes
    block_bytes = facts.spec.kv_block_bytes(facts.spec.dtype_bytes, BLOCK_TOKENS)
    return {
        "directory": facts.directory,
        "lasting": facts.directory == model.options.model,
        "block_tokens": BLOCK_TOKENS,
        "kv_blocks": None if kv_bytes is None else kv_bytes // block_bytes,
        "soon": replica is not None and kv_bytes is None,
    }
