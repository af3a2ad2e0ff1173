"""A vLLM engine that is to be frozen: made without weights, warmed up, then cloned.

It runs up to the freeze point once, when the image is made. Each clone goes on behind it: it gets
its weights by a loader that it is told, and answers. The engine is vLLM's `LLMEngine` in this very
process, eager, on the CPU; `frozen_limits` says what else there is, and why it cannot be frozen.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE, Reservation
from coldframe.loader.client import MemoryClient
from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.integrations.vllm import frozen_limits, frozen_memory
from coldframe.runtime.integrations.vllm.attached import provide
from coldframe.runtime.integrations.vllm.frozen_groups import begin_groups, end_groups
from coldframe.runtime.integrations.vllm.plugin import ask_for_tiles
from coldframe.snapshot.freeze import freeze_point
from coldframe.snapshot.hooks import Hooks
from coldframe.snapshot.privileges import shed
from coldframe.snapshot.wake import Wake

__all__ = ["FREEZE", "main"]

FREEZE = "from coldframe.runtime.integrations.vllm.frozen import main; main(3)"
"""The line of Python that such a process runs."""

_WARM_PROMPTS = (40, 3)
"""How many tokens the requests have that an engine is warmed up with, together."""
_WARM_TOKENS = 4


def main(control_fd: int) -> None:
    """The process's entry.

    Its order has `model` (the directory), `arguments` (of vLLM's `EngineArgs`), and `arenas`: how
    many addresses to keep free for weights and for KV.

    Args:
        control_fd: The inherited socket, to whoever freezes it.
    """
    control = Channel.from_fd(control_fd)
    try:
        order = control.recv()
        if order is None:
            os._exit(0)
        engine = _engine(order.body)
        weights, kv = order.body["arenas"]
        # Nothing else gets to lie there, now or in any clone.
        reserved = (
            Reservation(weights, WEIGHTS_BASE, exact=True),
            Reservation(kv, KV_BASE, exact=True),
        )
        shed()
        _forget_standard_streams()
        hooks = _come_to_rest(engine)
        control, wake = freeze_point(control, {"engine": "vllm"}, hooks=hooks)
    except Exception as error:  # noqa: BLE001 - whoever waits must hear of whatever it was
        if not isinstance(error, ColdframeError):
            error = SnapshotError("an engine cannot be frozen or woken", got=repr(error))
        control.send({"type": "broken", "error": error.to_wire()})
        os._exit(1)
    serve(control, wake, engine, reserved)


def serve(control: Channel, wake: Wake, engine: Any, reserved: tuple[Reservation, ...]) -> NoReturn:
    """A clone's own life, as a worker that does what its front says, one thing after the other.

    Messages in:  `load` (`load_format`, `extra`; a connection to a memory service may go beside
                  it), once; `ask` (`prompt_ids`, `max_tokens`).
    Messages out: `woken`, `loaded`, `answered` (`token_ids`, `logprobs`), or `failed`.

    Args:
        control: The socket to the front; its end is this process's.
        wake: What this start is.
        engine: The `LLMEngine`, without weights.
        reserved: The addresses of weights and KV, for a `MemoryClient`.
    """
    ran = {ran.name: (ran.end_ns - ran.start_ns) / 1e9 for ran in wake.ran}
    control.send({"type": "woken", "first_ns": wake.first_ns, "hooks": ran})
    while (message := control.recv()) is not None:
        body, started = message.body, time.monotonic()
        try:
            match message.kind:
                case "load":
                    frozen_memory.check_empty(engine)
                    _provide(message, wake.name, reserved)
                    frozen_memory.fill(engine, body["load_format"], body["extra"])
                    said: dict[str, Any] = {"type": "loaded"}
                case "ask":
                    prompt_ids, tokens = body["prompt_ids"], body["max_tokens"]
                    said = {"type": "answered", **_answer(engine, prompt_ids, tokens)}
                case other:
                    raise SnapshotError("an engine's clone does not know that", got=other)
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of whatever it was
            if not isinstance(error, ColdframeError):
                error = SnapshotError("an engine's clone has failed", got=repr(error))
            control.send({"type": "failed", "error": error.to_wire()})
        else:
            control.send({**said, "seconds": time.monotonic() - started})
    os._exit(0)


def _provide(message: Message, name: str, reserved: tuple[Reservation, ...]) -> None:
    """Has the loader take its weights over the connection that came with a message, if any."""
    if message.fds:
        (fd,) = message.fds
        provide(MemoryClient(Channel.from_fd(fd), name, reserved=reserved))


def _engine(order: Mapping[str, Any]) -> Any:
    """The engine, which has answered something."""
    arguments = order["arguments"]
    frozen_limits.check(arguments)
    _no_semaphores()
    import torch

    ask_for_tiles()
    set_num_threads = torch.set_num_threads
    from vllm import EngineArgs, LLMEngine

    frozen_memory.register_empty()
    engine = LLMEngine.from_engine_args(
        EngineArgs(model=order["model"], **{**arguments, "load_format": frozen_memory.EMPTY})
    )
    # vLLM takes it away where it has bound threads to cores, which this one has not.
    torch.set_num_threads = set_num_threads
    frozen_limits.check_built(engine)
    for length in _WARM_PROMPTS:
        _answer(engine, list(range(1, 1 + length)), _WARM_TOKENS)
    return engine


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


def _answer(engine: Any, prompt_ids: list[int], max_tokens: int) -> dict[str, Any]:
    """What the engine says to a prompt, greedily: tokens and their log-probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=0
    )
    engine.add_request("own", {"prompt_token_ids": prompt_ids}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                (made,) = output.outputs
                tokens = list(made.token_ids)
                steps = zip(made.logprobs, tokens, strict=True)
                logprobs = [step[token].logprob for step, token in steps]
                return {"token_ids": tokens, "logprobs": logprobs, "finish": made.finish_reason}
    raise SnapshotError("the engine has lost a request", where="LLMEngine.step")


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


def _forget_standard_streams() -> None:
    """Lets go of whatever the creator's terminal or log is."""
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
