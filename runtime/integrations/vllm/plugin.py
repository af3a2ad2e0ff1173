"""What vLLM calls in each of its processes, before it looks for loaders and connectors."""

from __future__ import annotations

__all__ = ["LOAD_FORMAT", "register"]

LOAD_FORMAT = "coldframe"


def register() -> None:
    """Makes this package known to vLLM. To be called as often as one likes."""
    from vllm.model_executor.model_loader import (
        _LOAD_FORMAT_TO_MODEL_LOADER,
        register_model_loader,
    )

    from coldframe.runtime.integrations.vllm.loader import ColdframeModelLoader

    # vLLM warns of a second registration.
    if _LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not ColdframeModelLoader:
        register_model_loader(LOAD_FORMAT)(ColdframeModelLoader)
    _register_connector()


def _register_connector() -> None:
    """The KV connector's place; `kv_connector_module_path` finds one that is not registered."""
