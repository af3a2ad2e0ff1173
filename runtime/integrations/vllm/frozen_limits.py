"""Which engines can be frozen: said by name before anything is begun.

What is refused here was tried first (`docs/vllm.md` has what came of it), or has no machine here
to be tried on. It is a list of what is known to work, and all else is refused: an engine that is
frozen with something of which nobody has thought would be wrong in each of its clones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from coldframe.loader.errors import SnapshotError

__all__ = ["check", "check_built"]


class _Limit(NamedTuple):
    """What an argument has to be, and why."""

    allowed: tuple[object, ...]
    why: str


_RANKS = "ranks are processes of their own, tied to each other by sockets and shared memory"
_LIMITS = {
    "tensor_parallel_size": _Limit((1,), _RANKS),
    "pipeline_parallel_size": _Limit((1,), _RANKS),
    "data_parallel_size": _Limit((1,), _RANKS),
    "decode_context_parallel_size": _Limit((1,), _RANKS),
    "prefill_context_parallel_size": _Limit((1,), _RANKS),
    "distributed_executor_backend": _Limit((None, "uni"), _RANKS),
    "enforce_eager": _Limit(
        (True,), "compiled code was traced over a model without weights, and fails on one with them"
    ),
    "quantization": _Limit(
        (None,), "what its weights become when they are loaded has not been tried in a clone"
    ),
    "speculative_config": _Limit(
        (None,), "the drafter's weights would be loaded at once, and be in the image"
    ),
    "enable_lora": _Limit((False, None), "adapters have not been tried in a clone"),
}


def check(arguments: Mapping[str, Any]) -> None:
    """Whether an engine with these arguments can be frozen.

    Args:
        arguments: Of vLLM's `EngineArgs`, as a replica sets them and its user.

    Raises:
        SnapshotError: It cannot; it says why.
    """
    for name, limit in _LIMITS.items():
        value = arguments.get(name, limit.allowed[0] if name != "enforce_eager" else False)
        if value not in limit.allowed:
            raise _refusal(name, limit.why, limit.allowed[0], value)


def check_built(engine: Any) -> None:
    """Whether an engine has become what its arguments said: vLLM decides some of it by itself.

    Raises:
        SnapshotError: It has not; it says in what.
    """
    config = engine.vllm_config
    core = type(engine.engine_core).__name__
    if core != "InprocClient":
        why = "its core is another process, behind sockets of zmq's"
        raise _refusal("VLLM_ENABLE_V1_MULTIPROCESSING", why, "InprocClient", core)
    device = config.device_config.device_type
    if device != "cpu":
        why = "its memory on the device is vLLM's own, which no image of ours has been made with"
        raise _refusal("device", why, "cpu", device)
    quantised = config.model_config.quantization
    if quantised is not None:
        raise _refusal("quantization", _LIMITS["quantization"].why, None, quantised)
    if config.model_config.is_moe:
        why = "experts can answer nothing before their weights are there, not even a warm-up"
        raise _refusal("model", why, "no experts", "experts")


def _refusal(where: str, why: str, expected: object, got: object) -> SnapshotError:
    return SnapshotError(
        f"an engine of this kind cannot be frozen: {why}",
        where=where,
        expected=expected,
        got=repr(got),
        hint="Such an engine starts fresh.",
    )
