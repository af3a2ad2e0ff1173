"""A vLLM engine with as little as possible between its exec and its first token.

For an engine of ours, which gets token ids and gives them, serves one model, and is told how much
KV it may have. What each of these saves is in `docs/LOG.md`; most of a start is imports, and those
are vLLM's own. Nothing here changes a token.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["collected_late", "lean_engine_args", "look_at_model_here"]


def lean_engine_args(model: str, kv_bytes: int, **more: Any) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs` for an engine that starts soon, and behind gates.

    Args:
        model: The checkpoint's directory; its config is read, its tokenizer is not.
        kv_bytes: What the KV cache takes. It is written to once on the CPU, so that it costs time,
            and it must be explicit, or the weights would be waited for to see what they leave.
        more: Further arguments, which go before these.
    """
    return {
        "model": model,
        "load_format": "coldframe",
        "kv_cache_memory_bytes": kv_bytes,
        "enforce_eager": True,  # neither compiled nor captured: gates need that, too
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # requests come with all of their parameters
        "disable_log_stats": True,
        **more,
    }


def look_at_model_here(model: str) -> bool:
    """Spares an engine of this very process the interpreter that vLLM asks about a model's class.

    vLLM imports a model's class in a process of its own to see what it can do, lest a GPU's context
    come up where it may have to be forked, and keeps the answer in `VLLM_CACHE_ROOT`. Where that is
    empty, as in a fresh container, the process has all of vLLM to import once more. An engine whose
    core is in this process will import the class anyway.

    Args:
        model: The checkpoint's directory.

    Returns:
        Whether that was done; it is left to vLLM where it does not know the architecture.
    """
    from vllm import ModelRegistry

    try:
        config = json.loads(Path(model, "config.json").read_text())
        (architecture,) = config["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # vLLM has the words for that
    known = ModelRegistry.models.get(architecture)
    if known is None or "auto_map" in config:
        return False
    model_class = known.load_model_cls()
    del ModelRegistry.models[architecture]  # one that is there twice is warned of
    ModelRegistry.register_model(architecture, model_class)
    return True


@contextmanager
def collected_late() -> Iterator[None]:
    """Leaves the garbage of a start alone: for the imports and the making of an engine.

    What is there behind it is there to stay, and the collector never looks at it again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
