"""Ways for a model's weights to lie in memory, as load plans have them and as Transformers does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan

ARRANGEMENTS = ("apart", "file", "aligned")
"""Each weight in memory of its own, or all in one arena under a layout of the load plan."""


def _zeros(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


def arrange(
    weights: Mapping[str, Tensor], arrangement: str, allocate: Callable[[int], Tensor] = _zeros
) -> dict[str, Tensor]:
    """Copies of tensors in fresh memory, laid out as workers find them.

    Args:
        weights: The tensors by name.
        arrangement: One of `ARRANGEMENTS`.
        allocate: Makes the arena, a uint8 tensor, from its size in bytes.
    """
    if arrangement == "apart":
        return {name: tensor.detach().clone() for name, tensor in weights.items()}
    with tempfile.TemporaryDirectory() as root:
        save_file(dict(weights), Path(root, "model.safetensors"))
        Path(root, "config.json").write_text("{}")
        plan = Plan.build(Checkpoint.open(root), layout=arrangement)
    memory = allocate(plan.arena_bytes)
    tensors = {}
    for p in plan.placements.values():
        weight = weights[p.name].detach()
        place = memory[p.arena_offset : p.arena_offset + p.nbytes]
        tensors[p.name] = place.view(weight.dtype).view(p.shape).copy_(weight)
    return tensors
