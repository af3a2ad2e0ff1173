"""Variables of a process with an engine of vLLM's in it, as all of ours have them.

Without torch and vLLM: whoever starts such a process sets them before it imports anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["ENGINE_ENVIRONMENT", "LEAN_ENVIRONMENT", "NOT_FOR_VLLM", "SAMPLER_ENVIRONMENT"]

ENGINE_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # One process: its core shares the weights' and the KV's addresses with whoever asks it, and
        # a second one would import everything again.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # A thread that asks subprocesses about the machine.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # All that it reads is there, and it is to ask nobody.
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        # What it says on the way is for those who look into it.
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
)
"""Of any of them; what its user has set goes first."""

SAMPLER_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        # The newer runner has another interface for logits processors.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        # `grammars` has a limit for expressions, too. Behind vLLM's own, threads go on that nobody
        # counts.
        "VLLM_REGEX_COMPILATION_TIMEOUT_S": "0",
    }
)
"""Where it draws with our sampler, whatever its user has set. An engine that is there does not
look at its variables any more, so it is set before."""

LEAN_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {**ENGINE_ENVIRONMENT, "VLLM_PLUGINS": "coldframe"}
)
"""Of one that is to start as soon as can be: of all plug-ins that are installed, ours alone."""

NOT_FOR_VLLM = (
    # What is set for our own workers' sake, and decides what vLLM finds and may compile.
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TORCH_DISABLE_NATIVE_JIT",
    # It would win over the size that it is given.
    "VLLM_CPU_KVCACHE_SPACE",
)
"""What an engine of a replica's does not get of its environment."""
