"""Which vLLM engine an image is asked for, or made of: by what decides what it answers.

The model decides most of an engine's arguments, and it is compared by itself; so are our own
sources, which decide what a replica sets. What is left is what the user has said: arguments, and
variables that vLLM reads. How much KV there is and how long a sequence may be come with an image,
unless somebody has asked for other sizes.

The front's side; vLLM is not imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from coldframe.runtime.integrations.vllm.environment import (
    ENGINE_ENVIRONMENT,
    NOT_FOR_VLLM,
    SAMPLER_ENVIRONMENT,
)
from coldframe.runtime.start.environment import without_secrets

__all__ = ["NAME", "asked_for", "engine_variables", "told"]

NAME = "vllm"
_PACKAGES = ("vllm", "transformers", "tokenizers")
_OURS = frozenset([*ENGINE_ENVIRONMENT, *NOT_FOR_VLLM, *SAMPLER_ENVIRONMENT])
_OF_A_SERVICE = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_|$)")
"""What Kubernetes sets in each pod for a service whose name begins with vllm."""
_NO_MATTER = ("VLLM_LOGGING_", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_RPC_BASE_PATH")
"""How those begin that decide no answer."""


def asked_for(
    args: Mapping[str, Any], kv_bytes: int | None, environ: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What is asked for, as `EngineKey.here` takes it.

    Args:
        args: The user's, of vLLM's `EngineArgs`.
        kv_bytes: How much KV is asked for; None takes what an image has.
        environ: The variables; by default this process's.
    """
    arguments, sizes = dict(args), {}
    if kv_bytes is not None:
        sizes["kv_cache_memory_bytes"] = kv_bytes
    if type(arguments.get("max_model_len")) is int:
        longest = arguments.pop("max_model_len")
        if longest > 0:  # else vLLM decides
            sizes["max_model_len"] = longest
    given = {"arguments": arguments, "environment": engine_variables(environ)}
    return {"name": NAME, "packages": list(_PACKAGES), "arguments": given, "sizes": sizes}


def engine_variables(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of an environment that vLLM reads, and that no replica sets itself."""
    return {
        name: value
        for name, value in sorted(without_secrets(environ).items())
        if name.startswith("VLLM_")
        and name not in _OURS
        and not name.startswith(_NO_MATTER)
        and not _OF_A_SERVICE.search(name)
    }


def told(arguments: str) -> dict[str, Any]:
    """The user's arguments, as an image's key has them.

    Args:
        arguments: `EngineKey.arguments`.
    """
    found: dict[str, Any] = json.loads(arguments)["arguments"]
    return found
