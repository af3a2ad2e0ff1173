"""A vLLM engine that is to be frozen: made without weights, warmed up, then cloned.

It runs up to the freeze point once, when the image is made. Each clone goes on behind it, as the
vLLM worker of one replica: it gets its weights over the connection that it is told of, and from
there on it is a worker like any other. The engine is vLLM's `LLMEngine` in this very process, made
as a replica's worker makes it but for the weights; `frozen_limits` says what else there is, and why
it cannot be frozen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE, Reservation
from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.frozen.worker import awake, forget_standard_streams
from coldframe.runtime.integrations.vllm import frozen_limits, frozen_memory
from coldframe.runtime.integrations.vllm.attached import expect
from coldframe.runtime.integrations.vllm.environment import SAMPLER_ENVIRONMENT
from coldframe.runtime.integrations.vllm.frozen_groups import begin_groups, end_groups
from coldframe.runtime.integrations.vllm.plugin import ask_for_tiles, register
from coldframe.runtime.integrations.vllm.worker import Frozen, import_engine
from coldframe.runtime.integrations.vllm.worker_process import work
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.worker.handoff import Job
from coldframe.runtime.worker.worker import Warm
from coldframe.snapshot.freeze import freeze_point
from coldframe.snapshot.hooks import Hooks
from coldframe.snapshot.privileges import shed

__all__ = ["main"]

_WARM_PROMPTS = (40, 3)
"""How many tokens the requests have that an engine is warmed up with, together."""
_WARM = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=2)
"""What is asked of them: without weights no logit is a number, and nothing can be drawn."""


def main(control_fd: int) -> None:
    """The process's entry.

    Its order has `arguments` (of vLLM's `EngineArgs`), `native` (whether the model's KV may come
    from native workers), and `arenas`: how many addresses to keep free for weights and for KV.

    Args:
        control_fd: The inherited socket, to whoever freezes it.
    """
    control = Channel.from_fd(control_fd)
    try:
        order = control.recv()
        if order is None:
            os._exit(0)
        frozen = _frozen(order.body)
        shed()
        forget_standard_streams()
        hooks = _come_to_rest(frozen.engine)
        control, wake = freeze_point(control, {"engine": "vllm"}, hooks=hooks)
    except Exception as error:  # noqa: BLE001 - whoever waits must hear of whatever it was
        if not isinstance(error, ColdframeError):
            error = SnapshotError("an engine cannot be frozen or woken", got=repr(error))
        control.send({"type": "broken", "error": error.to_wire()})
        os._exit(1)
    recorder, since_ns = awake(wake)
    work(control, recorder, since_ns, frozen=frozen)


def _frozen(order: Mapping[str, Any]) -> Frozen:
    """All that a vLLM worker has before it has weights."""
    os.environ.update(SAMPLER_ENVIRONMENT)
    frozen_limits.check(order["arguments"])
    _no_semaphores()
    import_engine()
    from coldframe.runtime.worker.text import Tokenizer

    tokenizer = Tokenizer.load(order["arguments"]["model"])
    engine = _engine(order)
    weights, kv = order["arenas"]
    # Nothing else gets to lie there, now or in any clone.
    reserved = (
        Reservation(weights, WEIGHTS_BASE, exact=True),
        Reservation(kv, KV_BASE, exact=True),
    )
    return Frozen(engine, Warm(tokenizer, reserved))


def _engine(order: Mapping[str, Any]) -> Any:
    """The engine, which has answered something."""
    import torch

    from coldframe.runtime.integrations.vllm.engine import start_engine
    from coldframe.runtime.integrations.vllm.lean import look_at_model_here

    register()
    ask_for_tiles()
    expect()
    frozen_memory.register_empty()
    frozen_memory.import_filling()
    set_num_threads = torch.set_num_threads
    arguments = {
        **order["arguments"],
        "load_format": frozen_memory.EMPTY,
        "model_loader_extra_config": {},
    }
    if order["native"]:
        look_at_model_here(arguments["model"])
    engine = start_engine(arguments, CPU, Recorder("frozen"), takes_kv=order["native"])
    # vLLM takes it away where it has bound threads to cores, which this one has not.
    torch.set_num_threads = set_num_threads
    frozen_limits.check_built(engine)
    _warm_up(engine)
    return engine


def _warm_up(engine: Any) -> None:
    """Has it answer as a replica would have it."""
    from coldframe.runtime.integrations.vllm.engine import Engine
    from coldframe.runtime.integrations.vllm.params import ask

    ours = Engine(engine)
    for length in _WARM_PROMPTS:
        job = Job(f"warm-{length}", 0, _WARM, prompt_ids=tuple(range(1, 1 + length)))
        ours.add(job.request, ask(job, ()))
    over = 0
    while ours.busy:
        over += sum(made.over == "length" for made in ours.step())
    if over != len(_WARM_PROMPTS):
        raise SnapshotError("the engine has lost a request", where="LLMEngine.step")


def _come_to_rest(engine: Any) -> Hooks:
    """Has the engine let go of all that cannot be frozen; what gives it back to a clone."""
    engine.reset_prefix_cache()
    frozen_memory.forget(engine)
    _end_progress_bars()
    coordinators = end_groups()
    hooks = Hooks.standard()
    hooks.register("vllm-groups", lambda _: begin_groups(coordinators))
    hooks.register("vllm-hashes", lambda _: _new_hashes(engine))
    return hooks


def _no_semaphores() -> None:
    """Progress bars would share a lock with other processes, in shared memory."""
    import threading

    from tqdm.std import tqdm  # type: ignore[import-untyped]

    tqdm.set_lock(threading.RLock())


def _end_progress_bars() -> None:
    """Ends the thread that looks after progress bars; the next bar starts one."""
    from tqdm.std import tqdm

    if tqdm.monitor is not None:
        tqdm.monitor.exit()
        tqdm.monitor = None


def _new_hashes(engine: Any) -> None:
    """What a block's hash begins with is random, and no clone's is to be another's."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import init_none_hash

    config = engine.vllm_config.cache_config
    if config.enable_prefix_caching:
        init_none_hash(get_hash_fn_by_name(config.prefix_caching_hash_algo))
