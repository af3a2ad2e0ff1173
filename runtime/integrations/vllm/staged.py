"""A vLLM model by the stages of a load plan: what each of them has to be filled and made ready.

vLLM makes a model ready for use once all its weights are in: quantised and repacked, module by
module, and then what spans modules. Here the same is done for one stage at a time, so this is also
where it is said which models that is possible for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coldframe.loader.stages import stage_names, stage_of_each

__all__ = ["Staged"]


class Staged:
    """The modules and parameters of a model by stage.

    Args:
        model: As vLLM has made it, before anything was loaded into it.
        model_config: vLLM's of it.

    Attributes:
        names: Of the stages, in the order of use.
        parameters: The model's, by all their names.
    """

    def __init__(self, model: Any, model_config: Any) -> None:
        self.model = model
        self.model_config = model_config
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        found, layers = stage_of_each(list(self.parameters), where=type(model).__name__)
        self.names = stage_names(layers)
        self._stage_of_parameter = found
        self._modules: list[list[tuple[str, Any]]] = [[] for _ in self.names]
        # Attention has no parameters of its own; its name tells the layer all the same.
        named = [(f"{name}.", module) for name, module in model.named_modules()]
        stages, _ = stage_of_each([name for name, _ in named], where=type(model).__name__)
        for name, module in named:
            self._modules[stages[name]].append((name[:-1], module))
        self._waiting = [
            {
                name
                for name, stage in found.items()
                if stage == index and not self._is_second_name(name)
            }
            for index in range(len(self.names))
        ]

    def _is_second_name(self, name: str) -> bool:
        """Whether a parameter goes by another name, of an earlier stage, that is loaded instead."""
        parameter, stage = self.parameters[name], self._stage_of_parameter[name]
        return any(
            other is parameter and self._stage_of_parameter[alias] < stage
            for alias, other in self.parameters.items()
        )

    # -- which models that is possible for -------------------------------------------------------

    def unfit(self) -> str | None:
        """Why this model cannot be used before all of it is there, where that is so."""
        from torch.nn import LayerNorm
        from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            UnquantizedEmbeddingMethod,
            VocabParallelEmbedding,
        )

        if hasattr(self.model, "process_weights_after_loading"):
            return "the model has a processing of its own behind its weights"
        if len(self.layers()) != len(self.names) - 2:
            return "its layers are not one list"
        plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
        known = (VocabParallelEmbedding, RMSNorm, GemmaRMSNorm, LayerNorm)
        for stage, modules in enumerate(self._modules):
            for name, module in modules:
                method = getattr(module, "quant_method", None)
                if method is not None and type(method) not in plain:
                    return f"{name} is not of plain weights ({type(method).__name__})"
                outside = stage in (0, len(self.names) - 1)
                own = dict(module.named_parameters(recurse=False))
                if outside and own and not isinstance(module, known):
                    return f"{name} is neither layer nor embedding, norm or head"
        return self._shared()

    def _shared(self) -> str | None:
        last = len(self.names) - 1
        first: dict[int, int] = {}
        for name, parameter in self.parameters.items():
            stage = self._stage_of_parameter[name]
            other = first.setdefault(id(parameter), stage)
            if other != stage and {other, stage} != {0, last}:
                return f"{name} belongs to several layers"
        return None

    def layers(self) -> list[Any]:
        """The decoder's layers, in their order."""
        from torch.nn import ModuleList

        lists = [m for m in self.model.modules() if isinstance(m, ModuleList)]
        outermost = [m for m in lists if any(True for _ in m.parameters())][:1]
        return [layer for found in outermost for layer in found]

    def doors(self, stage: int) -> list[Any]:
        """The modules whose forward is the first to look at a stage's weights.

        The head's own is called by no forward of its, but by the model's `compute_logits`.
        """
        if 0 < stage < len(self.names) - 1:
            return [self.layers()[stage - 1]]
        return [m for _, m in self._modules[stage] if any(True for _ in m.parameters(False))]

    # -- filling them ----------------------------------------------------------------------------

    def filled(self, parameters: Iterable[str]) -> None:
        """Says that parameters hold their weights, by their names in the model."""
        found = set(parameters)
        for waiting in self._waiting:
            waiting -= found

    def missing(self, stage: int) -> set[str]:
        """The parameters of a stage that hold nothing yet.

        A checkpoint may bring some with a later stage than the model's names tell.
        """
        return self._waiting[stage]

    def finish(self, stage: int, device: Any) -> None:
        """Makes a stage ready for use, all parameters of which are filled.

        Args:
            stage: Which. Those before it are finished.
            device: Where the model computes.
        """
        from vllm.model_executor.layers.attention import is_deferred_attention_layer
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
        from vllm.model_executor.model_loader.utils import device_loading_context
        from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings

        if stage == len(self.names) - 1:
            # Looks at embedding and head, and replaces the latter before it has been used.
            maybe_retie_word_embeddings(self.model, self.model_config)
        for _, module in self._modules[stage]:
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                with device_loading_context(module, device):
                    method.process_weights_after_loading(module)
                if hasattr(module, "update_param_tp_status"):
                    module.update_param_tp_status()
        # As in vLLM, attention comes behind all that it is made of.
        for _, module in self._modules[stage]:
            if is_deferred_attention_layer(module):
                with device_loading_context(module, device):
                    module.process_weights_after_loading(self.model_config.dtype)
