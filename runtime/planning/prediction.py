"""What a model will need, before anything is loaded: device memory, and time to the first token.

The memory is weights + KV + activations + overhead. The time is the law of the cold start, bytes
over bandwidth, beside the time that a fresh worker takes to import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from coldframe.loader.checkpoints.plan import Plan
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS

__all__ = ["MemoryPrediction", "predict_memory"]

_WORKER_BYTES = 220_000_000
"""A worker's own memory: Python, torch and its kernels' scratch (150 to 220 MB of PSS seen)."""


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """Bytes of device memory.

    Args:
        weights: The arena.
        kv: Keys and values of all sequences at their full length, in whole blocks.
        activations: The largest tensors that a prefill of one full context holds at once.
        overhead: The processes themselves.
    """

    weights: int
    kv: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations + self.overhead


def predict_memory(
    plan: Plan,
    spec: ModelSpec,
    *,
    context: int,
    batch: int,
    overhead: int = 2 * _WORKER_BYTES,
) -> MemoryPrediction:
    """Predicts the device memory of a replica.

    Args:
        plan: The load plan.
        spec: The model.
        context: Tokens of prompt and answer of each sequence.
        batch: Sequences at once.
        overhead: What its processes take for themselves; by default two workers on a CPU.
    """
    blocks = -(-context // BLOCK_TOKENS) * batch
    # Through the MLP a token holds its residual, its normalised copy, gate, up and their product;
    # in attention q, k, v and the output are less. Logits are in float32, one row a sequence.
    widest = 3 * spec.hidden_size + 3 * spec.intermediate_size
    activations = context * widest * spec.dtype_bytes + batch * spec.vocab_size * 4
    return MemoryPrediction(
        plan.arena_bytes,
        blocks * spec.kv_block_bytes(spec.dtype_bytes, BLOCK_TOKENS),
        activations,
        overhead,
    )
