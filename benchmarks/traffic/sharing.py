"""What models take of a device that they share, reckoned as an endpoint does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coldframe.benchmarks.traffic.simulate import Sharing
from coldframe.runtime.device_choice import CPU
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.served import memory_to_share
from coldframe.runtime.sizing import ModelFacts, context_bytes, kv_blocks

__all__ = ["sharing"]


def sharing(
    models: Sequence[Path], memory: int | None, kv_memory: int | None, device: str
) -> Sharing | None:
    """What each takes of a device's memory: as much as the one that takes most.

    Args:
        models: Checkpoints' directories.
        memory: What they have together, in bytes; None where that holds them all.
        kv_memory: For KV of each; None for the endpoint's default.
        device: `cpu` or `cuda:N`.

    Raises:
        ColdframeError: One is no model that can be served, or there is no memory for its KV.
    """
    if memory is None:
        return None
    options = ReplicaOptions(str(models[0]), device=device, kv_bytes=kv_memory)
    _, options = memory_to_share(options, 2, memory, lambda: memory)
    contexts = max(context_bytes(options, each) for each in options.devices)
    kept, kv = 0, 0
    for model in models:
        facts = ModelFacts(str(model))
        block, blocks = kv_blocks(facts.spec, options.kv_bytes, available=memory)
        kept = max(kept, (facts.weights_bytes or 0) + contexts)
        kv = max(kv, block * blocks)
    # On a GPU weights and contexts leave for host memory; where they are in that already they stay.
    return Sharing(memory, kept + kv, kept if device == CPU else 0)
