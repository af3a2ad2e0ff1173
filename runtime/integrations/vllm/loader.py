"""`--load-format coldframe`: vLLM's weights from coldframe's memory, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.utils.torch_utils import set_default_torch_dtype

from coldframe.loader.client import MemoryClient
from coldframe.runtime.integrations.vllm.attached import attach
from coldframe.runtime.integrations.vllm.gated import GatedLoad, may_gate, refusal
from coldframe.runtime.integrations.vllm.load_settings import LoadSettings
from coldframe.runtime.integrations.vllm.staged import Staged
from coldframe.runtime.tensors import tensors_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig

__all__ = ["ColdframeModelLoader"]


class ColdframeModelLoader(BaseModelLoader):
    """Fills vLLM's models from an arena.

    Args:
        load_config: Its `model_loader_extra_config` has the keys of `load_settings`.

    Raises:
        RequestError: The settings cannot be.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._extra: dict[str, Any] = dict(load_config.model_loader_extra_config or {})
        self.settings = LoadSettings.parse(self._extra)
        self._made: Any = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: weights come when they are loaded."""

    def load_model(self, vllm_config: Any, model_config: ModelConfig, prefix: str = "") -> Any:
        """A model, either whole or behind gates that open as its weights come in (`gated`)."""
        if may_gate(self.settings.gated, refusal(vllm_config)):
            return self._load_behind_gates(vllm_config, model_config, prefix)
        return super().load_model(vllm_config, model_config, prefix)

    def _load_behind_gates(self, vllm_config: Any, model_config: ModelConfig, prefix: str) -> Any:
        client = attach(self._extra, model=model_config.model)  # its bytes come meanwhile
        device = torch.device(vllm_config.load_config.device or vllm_config.device_config.device)
        with set_default_torch_dtype(model_config.dtype), device:
            self._made = self.create_model(vllm_config, model_config, prefix)
        staged = Staged(self._made, model_config)
        if not may_gate(self.settings.gated, staged.unfit()):
            return super().load_model(vllm_config, model_config, prefix)
        GatedLoad(staged, client, device)
        return self._made.eval()

    def create_model(self, vllm_config: Any, model_config: ModelConfig, prefix: str = "") -> Any:
        # Layers put themselves on a list as they are made, so that none can be made twice.
        if self._made is not None:
            return self._made
        return super().create_model(vllm_config, model_config, prefix)

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:
        """Fills a model's parameters, in the order in which the weights come in."""
        client = attach(self._extra, model=model_config.model)
        model.load_weights(weights_in_order(client))


def weights_in_order(client: MemoryClient) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by name, as views of the arena, each as soon as its stage is in."""
    plan, arena = client.wait_weights()
    tensors = tensors_of(plan, arena)
    for stage in plan.stages:
        client.wait_stage(stage.index)
        for placement in plan.placements.values():
            if placement.stage == stage.index:
                yield placement.name, tensors[placement.name]
