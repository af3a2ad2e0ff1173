"""What vLLM calls in each of its processes, before it looks for loaders and connectors."""

from __future__ import annotations

import contextlib

__all__ = ["LOAD_FORMAT", "ask_for_tiles", "register"]

LOAD_FORMAT = "coldframe"


def register() -> None:
    """Makes this package known to vLLM. To be called as often as one likes."""
    from vllm.model_executor.model_loader import (
        _LOAD_FORMAT_TO_MODEL_LOADER,
        register_model_loader,
    )

    from coldframe.runtime.integrations.vllm.early_load import load_early
    from coldframe.runtime.integrations.vllm.loader import ColdframeModelLoader

    # vLLM warns of a second registration.
    if _LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not ColdframeModelLoader:
        register_model_loader(LOAD_FORMAT)(ColdframeModelLoader)
    load_early(LOAD_FORMAT)
    ask_for_tiles()
    _register_connector()


def ask_for_tiles() -> None:
    """Asks the kernel for AMX's tiles, where the CPU has them; once is enough for a process.

    vLLM's attention uses them and leaves it to others to ask. oneDNN does with its first product of
    matrices; a short first prompt, or one before which nothing was computed, may come without it,
    and the process would die of an illegal instruction.
    """
    import torch

    ask = getattr(torch.cpu, "_init_amx", None)  # not torch's to promise
    if ask is not None:
        with contextlib.suppress(RuntimeError):
            ask()


def _register_connector() -> None:
    """The KV connector's place; `kv_connector_module_path` finds one that is not registered."""
