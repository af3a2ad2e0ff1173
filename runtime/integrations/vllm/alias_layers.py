"""Which of vLLM's layers may have their weights in the arena, and compute with them there.

The arena is mapped for reading only, and others read it too: a layer whose weights are changed
after the load, in place, needs a copy. On the CPU there is a choice besides: vLLM packs the
weights of linear layers for oneDNN, which is a second copy of them all, and `keep_in_place` has it
compute with them where they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from vllm.model_executor.layers.layernorm import LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from coldframe.runtime.integrations.vllm.alias_copies import Reason

__all__ = ["InPlace", "is_packed", "keep_in_place", "owners", "why_apart"]

_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
"""Those whose post-processing replaces what it changes, and writes to nothing."""


class InPlace(UnquantizedEmbeddingMethod):
    """An embedding or a head that needs no packed copy of its weight."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = linear


def owners(model: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
    """The modules that have each parameter: several where weights are tied."""
    by_id: dict[int, tuple[str, list[torch.nn.Module]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=True):
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            by_id.setdefault(id(parameter), (full, []))[1].append(module)
    return dict(by_id.values())


def why_apart(modules: list[torch.nn.Module]) -> Reason | None:
    """Why a parameter of these modules must be a copy, or None where it need not."""
    for module in modules:
        if isinstance(module, (LinearBase, VocabParallelEmbedding)):
            method = module.quant_method
            if not isinstance(method, _METHODS):
                return f"post-processed by {type(method).__name__}"
        elif not isinstance(module, (RMSNorm, LayerNorm, torch.nn.LayerNorm, torch.nn.RMSNorm)):
            return f"of a {type(module).__name__}"
    return None


def is_packed(name: str, modules: list[torch.nn.Module]) -> bool:
    """Whether vLLM makes a packed copy of a parameter of these modules, on the CPU, if it can."""
    of_linear = (
        isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod
        for module in modules
    )
    return name.endswith(".weight") and all(of_linear)


def keep_in_place(module: Any, *, packed: bool) -> None:
    """Spares a layer the packing of its weights; to be called before it is post-processed.

    Args:
        module: A layer on the CPU whose weight is in the arena.
        packed: Whether layers that compute with packed weights are to have them all the same.
    """
    if isinstance(module, VocabParallelEmbedding):
        # An embedding is looked up in its rows, never multiplied with.
        looked_up = not isinstance(module, ParallelLMHead)
        if type(module.quant_method) is UnquantizedEmbeddingMethod and (looked_up or not packed):
            module.quant_method = InPlace()
    elif isinstance(module, LinearBase) and not packed:
        module._cpu_skip_gemm_dispatch = True
