"""The adapters by name; each is imported when a profile has a route for it."""

from __future__ import annotations

from importlib import import_module

from coldframe.runtime.gateway.platforms.base import Adapter, Events, Requests

__all__ = ["ADAPTERS", "Adapter", "Events", "Requests", "adapter"]

ADAPTERS = {
    "cog": ("cog", "CogAdapter"),
    "huggingface": ("generate", "HuggingFaceAdapter"),
    "invoke": ("invoke", "InvokeAdapter"),
    "kserve": ("kserve", "KServeAdapter"),
    "openai": ("invoke", "OpenAIAdapter"),
    "runpod": ("jobs", "JobAdapter"),
    "sagemaker": ("generate", "SageMakerAdapter"),
    "vertex": ("vertex", "VertexAdapter"),
}
"""Names as in the table of profiles, and the module and class of each."""


def adapter(name: str) -> Adapter:
    """The adapter of that name.

    Raises:
        KeyError: There is none; the table of profiles names only these.
    """
    module, kind = ADAPTERS[name]
    found: Adapter = getattr(import_module(f"{__package__}.{module}"), kind)()
    return found
