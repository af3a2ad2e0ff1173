"""What of an engine's memory is not in its image: the weights, and what KV there is.

The model of an engine that is to be frozen is made without weights: its parameters are addresses
that nobody has written to, which the kernel has no memory for. A clone has any of vLLM's loaders
fill in that same model. KV is memory that is zero until it is used, so it is enough to give back
what the warm-up has used.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from coldframe.loader.arena import round_up
from coldframe.loader.errors import SnapshotError

__all__ = ["EMPTY", "fill", "forget", "import_filling", "model_of", "register_empty"]

EMPTY = "coldframe-empty"
"""The load format of an engine without weights."""

_MADV_DONTNEED = 4


def register_empty() -> None:
    """Makes the load format known to vLLM, in this process."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.utils.torch_utils import set_default_torch_dtype

    class EmptyLoader(BaseModelLoader):
        """Makes a model as it is before its weights are loaded."""

        def download_model(self, model_config: Any) -> None:
            """Nothing comes from anywhere."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            """Nor here."""

        def load_model(
            self, vllm_config: Any, model_config: Any, prefix: str = ""
        ) -> torch.nn.Module:
            device = torch.device(vllm_config.device_config.device)
            with set_default_torch_dtype(model_config.dtype), device:
                model = self.create_model(vllm_config, model_config, prefix)
            for module in model.modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, torch.Tensor) and weight.dim() == 2:
                    # Which kernel a layer has is decided when its weights are packed, in a clone.
                    # Packed now they would be in the image.
                    module.cpu_linear = torch.nn.functional.linear
            return model.eval()

    register_model_loader(EMPTY)(EmptyLoader)


def import_filling() -> None:
    """Imports what `fill` needs, and what it leads to: a clone may not be let in where that is."""
    import coldframe.loader.devices.cpu
    import coldframe.loader.loads.placing
    import coldframe.runtime.integrations.vllm.connector
    import coldframe.runtime.integrations.vllm.gated
    import coldframe.runtime.integrations.vllm.loader  # noqa: F401
    from coldframe.runtime.integrations.vllm.filling import import_post_processing

    import_post_processing()


def fill(engine: Any, load_format: str, extra: Mapping[str, object]) -> None:
    """Has one of vLLM's loaders load the weights into an engine without.

    Args:
        engine: The `LLMEngine`.
        load_format: The loader's name.
        extra: Its `model_loader_extra_config`.

    Returns when they are in, whether or not the loader gives the model out before.

    Raises:
        SnapshotError: The loader makes a model of its own.
        ColdframeError: The weights cannot be had.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    from coldframe.runtime.integrations.vllm.gated import gated_load

    config, model = engine.vllm_config, model_of(engine)
    load_config = replace(
        config.load_config, load_format=load_format, model_loader_extra_config=dict(extra)
    )
    loader = get_model_loader(load_config)
    # What is frozen says the empty format: nobody is to find that there later.
    config.load_config = _runner_of(engine).load_config = load_config
    loader.create_model = lambda *_, **__: model
    with set_current_vllm_config(config):
        loaded = loader.load_model(vllm_config=config, model_config=config.model_config)
        if load := gated_load(loaded):
            load.wait()
    if loaded is not model:
        raise SnapshotError(
            "the loader does not fill in the model that it is given",
            where=load_format,
            expected="a load_model() that calls create_model()",
            got=type(loader).__name__,
            hint="Start the engine fresh with this load format.",
        )


def forget(engine: Any) -> None:
    """Gives back the memory behind weights and KV, and keeps the addresses; both are zero then."""
    from torch.nn import Module

    model: Module = model_of(engine)
    drop(
        (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        for tensor in (*model.parameters(), *_runner_of(engine).kv_caches)
    )


def drop(stretches: Iterable[tuple[int, int]]) -> None:
    """Gives back whole pages of private memory and clears what is left at their ends.

    Args:
        stretches: Addresses and bytes; the same may come more than once.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for address, nbytes in sorted(set(stretches)):
        begin = round_up(address, mmap.PAGESIZE)
        end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if begin >= end:
            ctypes.memset(address, 0, nbytes)
            continue
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
        ctypes.memset(address, 0, begin - address)
        ctypes.memset(end, 0, address + nbytes - end)


def model_of(engine: Any) -> Any:
    """The model of an `LLMEngine` in this process."""
    return _runner_of(engine).model


def _runner_of(engine: Any) -> Any:
    executor = engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner
