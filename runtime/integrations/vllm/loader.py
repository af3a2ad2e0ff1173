"""`--load-format coldframe`: vLLM's weights from coldframe's memory, stage by stage."""

from __future__ import annotations

import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.utils.torch_utils import set_default_torch_dtype

from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.checkpoints.slices import WHOLE, Rank
from coldframe.loader.errors import RequestError
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.runtime.integrations.vllm.attached import attach, own_memory, release
from coldframe.runtime.integrations.vllm.filling import Filling, import_post_processing
from coldframe.runtime.integrations.vllm.gated import GatedLoad, gated_load, may_gate, refusal
from coldframe.runtime.integrations.vllm.load_settings import LoadSettings
from coldframe.runtime.integrations.vllm.staged import Staged
from coldframe.runtime.integrations.vllm.witness import Witness

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

__all__ = ["ColdframeModelLoader", "FILLED"]

FILLED = "coldframe_filling"
"""The attribute of a loaded model that has its `Filling`: what became of each parameter."""

_logger = init_logger("vllm.coldframe")


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
        if load := gated_load(model):
            load.wait()
        witness = self.witness(model_config)
        filling = self.open(model, model_config, _device_of(model), witness)
        self._fill(filling)
        if self.settings.alias == "off":
            filling.leave_arena("as asked")

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        """Makes a model, fills it and has it post-processed.

        Where that may be (`gated`) it is given out empty, behind gates that open as it is filled.

        Raises:
            ColdframeError: Its weights cannot be had, or do not fit it.
        """
        gated = may_gate(self.settings.gated, refusal(vllm_config))
        # The bytes first: they come in while the model is made.
        device = _indexed(torch.device(self.load_config.device or vllm_config.device_config.device))
        with ThreadPoolExecutor(1) as beside:
            connected = beside.submit(self.connect, model_config, device)
            witness = beside.submit(self.witness, model_config)
            with set_default_torch_dtype(model_config.dtype), device:
                model = self.create_model(vllm_config, model_config, prefix)
            if gated:
                import_post_processing()
            client = connected.result()
        with set_default_torch_dtype(model_config.dtype):
            filling = self.open(model, model_config, device, witness.result())
            if gated:
                staged = Staged(model, filling.stages)
                if may_gate(self.settings.gated, staged.unfit()):
                    then = partial(self._let_go, filling)
                    GatedLoad(staged, filling, client, model_config, device, then=then)
                    return model.eval()
            self._fill(filling)
            started = time.perf_counter()
            filling.process_all()
            self._let_go(filling)
            gc.collect()
            torch.accelerator.empty_cache()
            _logger.info_once("Post-processing took %.2f seconds", time.perf_counter() - started)
        return model.eval()

    def connect(self, model_config: ModelConfig, device: torch.device) -> MemoryClient:
        """The connection to where this process' weights come in; they are on their way then.

        Raises:
            RequestError: What is there is for another tensor-parallel rank.
            ColdframeError: See `attached.attach`.
        """
        rank = Rank(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        return attach(self._extra, model=place_of(model_config), rank=rank, device=_name_of(device))

    def witness(self, model_config: ModelConfig) -> Witness | None:
        """The weights that vLLM's MODEL has, where others may come: from a place of their own."""
        model = place_of(model_config)
        if self.settings.memory_service is None and self.settings.source in (None, model):
            return None
        return Witness.of(model)

    def open(
        self,
        model: Any,
        model_config: ModelConfig,
        device: torch.device,
        witness: Witness | None = None,
    ) -> Filling:
        """A model that is to be filled.

        Args:
            model: As vLLM has made it.
            model_config: Its.
            device: Where it is.
            witness: See `Filling`.

        Raises:
            RequestError: What is in the arena is for another tensor-parallel rank.
            ColdframeError: Its weights will not come.
        """
        client = self.connect(model_config, device)
        _check_rank(client.wait_weights()[0])
        alias = self.settings.alias
        filling = Filling(
            model,
            model_config,
            client,
            alias=alias != "off",
            packed=alias != "on",
            device=device,
            witness=witness,
        )
        setattr(model, FILLED, filling)
        return filling

    def _let_go(self, filling: Filling) -> None:
        """Ends a memory service of our own that nobody else has anything of.

        Where vLLM computes with packed copies, the arena would be a second one of the weights.
        """
        if self.settings.alias == "off":
            filling.leave_arena("as asked")
            _logger.info("%s", filling.summary())
        shared = own_memory(filling.client) is None or "serve_peers" in self.settings.options
        if self.settings.alias != "on" and filling.device.type == "cpu" and not shared:
            filling.leave_arena()
            release(filling.client)

    def _fill(self, filling: Filling) -> None:
        started = time.perf_counter()
        filling.fill_all()
        filling.check_complete()
        _logger.info_once("Loading weights took %.2f seconds", time.perf_counter() - started)
        if self.settings.alias != "off":  # what vLLM packs is to leave the arena yet
            _logger.info("%s", filling.summary())


def _check_rank(plan: Plan) -> None:
    here = Rank(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
    if plan.rank not in (WHOLE, here):
        raise RequestError(
            "the memory service has the slices of another tensor-parallel rank",
            expected=f"rank {here.index} of {here.ranks}, or the whole model",
            got=f"rank {plan.rank.index} of {plan.rank.ranks}",
            hint="Give vLLM a service of the whole model, or a `source`.",
        )


def place_of(model_config: ModelConfig) -> str:
    """Where the model is that vLLM was given, as the loader writes it."""
    place: str = model_config.model_weights or model_config.model
    if model_config.revision is None or "://" in place or os.path.isdir(place):
        return place
    return f"{place}@{model_config.revision}"


def _device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _indexed(device: torch.device) -> torch.device:
    """The same with its number, for other threads: which device is the current one is a thread's.

    Args:
        device: The caller's; without a number it is the one that is current in the caller's thread.
    """
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def _name_of(device: torch.device) -> str:
    """As the loader's devices are named."""
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index}"
