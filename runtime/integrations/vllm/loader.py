"""`--load-format coldframe`: vLLM's weights from coldframe's memory, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from coldframe.loader.client import MemoryClient
from coldframe.runtime.integrations.vllm.attached import attach
from coldframe.runtime.integrations.vllm.load_settings import LoadSettings
from coldframe.runtime.tensors import tensors_of

if TYPE_CHECKING:
    import torch
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

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: weights come when they are loaded."""

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
