"""A vLLM model by the stages of a load plan, and whether it can be used before all of them are in.

vLLM runs any model; what is known here is the shape that most of them have: an embedding, one list
of layers, a norm and a head, and nothing that is made of the weights of several of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coldframe.loader.checkpoints.stages import stage_names, stage_of_each

__all__ = ["Staged"]


class Staged:
    """The parameters and modules of a model by stage.

    Args:
        model: As vLLM has made it, before anything was loaded into it.
        stages: Those of the plan that it is to be loaded by.

    Attributes:
        names: Of the model's own stages, in the order of use.
    """

    def __init__(self, model: Any, stages: Sequence[int]) -> None:
        self.model = model
        self._stages = stages
        # A tied head goes by the embedding's name, which comes first.
        parameters = {name: p for name, p in model.named_parameters() if p.numel()}
        found, layers = stage_of_each(list(parameters), where=type(model).__name__)
        self.names = stage_names(layers)
        self._parameters: list[list[str]] = [[] for _ in self.names]
        for name, stage in found.items():
            self._parameters[stage].append(name)
        # Attention has no parameters of its own; its name tells the layer all the same.
        named = {f"{name}.": module for name, module in model.named_modules()}
        stage_of, _ = stage_of_each(list(named), where=type(model).__name__)
        self._modules: list[dict[str, Any]] = [{} for _ in self.names]
        for name, module in named.items():
            self._modules[stage_of[name]][name[:-1]] = module

    def unfit(self) -> str | None:
        """Why this model cannot be used before all of it is there, where that is so."""
        from torch.nn import LayerNorm
        from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            UnquantizedEmbeddingMethod,
            VocabParallelEmbedding,
        )

        if len(self._stages) != len(self.names):
            return "the checkpoint has other layers than the model"
        if hasattr(self.model, "process_weights_after_loading"):
            return "the model has a processing of its own behind its weights"
        if len(self._layers()) != len(self.names) - 2:
            return "its layers are not one list"
        plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
        known = (VocabParallelEmbedding, RMSNorm, GemmaRMSNorm, LayerNorm)
        for stage, modules in enumerate(self._modules):
            outside = stage in (0, len(self.names) - 1)
            for name, module in modules.items():
                method = getattr(module, "quant_method", None)
                if method is not None and not isinstance(method, plain):
                    return f"{name} is not of plain weights ({type(method).__name__})"
                if outside and _has_own(module) and not isinstance(module, known):
                    return f"{name} is neither layer nor embedding, norm or head"
        return self._shared()

    def _shared(self) -> str | None:
        first: dict[int, int] = {}
        for stage, modules in enumerate(self._modules):
            for name, module in modules.items():
                for parameter in module.parameters(recurse=False):
                    other = first.setdefault(id(parameter), stage)
                    if other != stage and (other, stage) != (0, len(self.names) - 1):
                        return f"{name} shares weights with {self.names[other]}"
        return None

    def _layers(self) -> list[Any]:
        from torch.nn import ModuleList

        lists = [m for m in self.model.modules() if isinstance(m, ModuleList)]
        with_weights = [found for found in lists if any(True for _ in found.parameters())]
        return list(with_weights[0]) if with_weights else []

    def doors(self, stage: int) -> list[Any]:
        """The modules whose forward is the first to look at a stage's weights.

        A head has none that is called: what looks at it is the model's `compute_logits`.
        """
        if 0 < stage < len(self.names) - 1:
            return [self._layers()[stage - 1]]
        return [module for module in self._modules[stage].values() if _has_own(module)]

    def parameters(self, stage: int) -> list[str]:
        """The parameters of a stage, by the first of their names in the model."""
        return self._parameters[stage]


def _has_own(module: Any) -> bool:
    return any(True for _ in module.parameters(recurse=False))
