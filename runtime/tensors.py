"""An arena's weights as torch tensors: views by name, nothing copied or read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldframe.loader.plan import Plan

# Torch is on its way while this is imported.
if TYPE_CHECKING:
    import torch

__all__ = ["tensors_of", "torch_dtypes"]


def torch_dtypes() -> dict[str, torch.dtype]:
    """Torch's dtypes by their safetensors names: those that the engine computes in."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def tensors_of(plan: Plan, arena: memoryview) -> dict[str, torch.Tensor]:
    """The planned tensors by name, as views of the arena.

    Args:
        plan: Where they lie.
        arena: The arena's bytes, which must stay mapped as long as a tensor is used.
    """
    import torch

    memory, dtypes = torch.frombuffer(arena, dtype=torch.uint8), torch_dtypes()
    return {
        p.name: memory[p.arena_offset : p.arena_offset + p.nbytes]
        .view(dtypes[p.dtype])
        .view(p.shape)
        for p in plan.placements.values()
        if p.dtype in dtypes
    }
