"""The bytes on their way before vLLM asks for them: while an engine makes its worker.

A loader is made when the model is to be loaded. Between that and the moment when the process knows
its model lie half a second and more, of imports, process groups and a look at the machine. vLLM has
no call for plug-ins there, so the making of its executor is wrapped; where a release has none by
that name, the bytes come as early as the loader does. So they do for ranks, which are processes of
their own and know nothing before they are asked to load.

On a CPU alone, and where it is said how much KV there is to be: else vLLM looks at how much memory
is free before it loads, and what is there already would be missing from that.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any

from coldframe.loader.errors import ColdframeError

__all__ = ["load_early"]

_WRAPPED = "_coldframe_loads_early"


def load_early(load_format: str) -> None:
    """Has this process's engines begin their loads early, where theirs is this load format."""
    try:
        from vllm.v1.executor.abstract import Executor
        from vllm.v1.executor.uniproc_executor import UniProcExecutor
    except ImportError:  # a release that has them elsewhere
        return
    make = Executor.__init__
    if hasattr(make, _WRAPPED):
        return

    @functools.wraps(make)
    def wrapped(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        here = isinstance(self, UniProcExecutor) and vllm_config.parallel_config.world_size == 1
        on_cpu = vllm_config.device_config.device_type == "cpu"
        looks = vllm_config.cache_config.kv_cache_memory_bytes is None
        if here and on_cpu and not looks and vllm_config.load_config.load_format == load_format:
            threading.Thread(
                target=_attach, args=(vllm_config,), name="coldframe-early-load", daemon=True
            ).start()
        make(self, vllm_config, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    Executor.__init__ = wrapped


def _attach(config: Any) -> None:
    """Does what the loader will ask for; it finds a connection there, or what is in the way."""
    from coldframe.runtime.integrations.vllm.attached import attach
    from coldframe.runtime.integrations.vllm.loader import place_of

    extra = dict(config.load_config.model_loader_extra_config or {})
    # What is wrong is for the loader to say, which asks for the same and fails likewise.
    with contextlib.suppress(ColdframeError, OSError):
        attach(extra, model=place_of(config.model_config))
