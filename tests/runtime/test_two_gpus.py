"""Replicas that prefill on one GPU and decode on another, both emulated; see `emulated`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import Replica
from coldframe.runtime.scale_spec import Scale
from tests.runtime.emulated import emulate
from tests.runtime.helpers import ask, expected, finish, prompt_of, wait_for

Make = Callable[..., Path]
FIRST, SECOND = "cuda:0", "cuda:1"
TWO = {"devices": 2}


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    spread = {
        "prefill": Scale(1, 1, FIRST),
        "decode": Scale(1, 1, SECOND),
        "device": FIRST,
        "kv_bytes": 16 << 20,
        "run_dir": str(runs),
    }
    return ReplicaOptions(str(model), **(spread | more))  # type: ignore[arg-type]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch, memory=TWO, worker=TWO)


def unused(replica: Replica) -> bool:
    """Whether no block is in use on either device; asked anew each time."""
    before = replica.usage
    replica.ask_usage()
    wait_for(replica, lambda: replica.usage is not before)
    return replica.usage["kv_used"] == 0


def test_answers_are_those_of_transformers(
    demo_model: Make, no_leaks: Path, two_gpus: None
) -> None:
    model = demo_model("llama", "float32")
    prompts = [prompt_of(length, seed=length) for length in (1, 40, 200)]
    with Replica(options(model, no_leaks)) as replica:
        clients = [ask(replica, prompt, 12) for prompt in prompts]
        finish(replica, *clients)
        assert {name.rpartition("-")[0] or name for name in replica.pids} >= {"prefill", "decode"}
        assert {"memory", "memory-2"} < set(replica.pids)
        assert replica.facts["device"] == "cuda:0, cuda:1"
        wait_for(replica, lambda: replica.loaded)
        wait_for(replica, lambda: unused(replica))
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.error is None
        assert client.tokens == expected(model, tuple(prompt), 12)
