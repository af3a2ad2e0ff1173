"""A replica at rest whose workers' contexts leave the GPU, too: answers are what they were."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.devices.cuda import CudaDevice
from coldframe.runtime.replica.replica import Replica
from tests.gpu.replicas import expected, options, pid_of
from tests.runtime.helpers import ask, finish, prompt_of, wait_for

Make = Callable[..., Path]


def answers(replica: Replica, model: Path, device: str, *, seed: int) -> None:
    """As many tokens as have a step captured, and replayed, in the first turn already."""
    prompt = prompt_of(100, seed=seed)
    client = ask(replica, prompt, 24)
    finish(replica, client)
    assert client.error is None, client.error
    assert client.tokens == expected(model, device, tuple(prompt), 24)


def rests(replica: Replica) -> bool:
    """Has it rest. Whether its contexts have left: where they cannot, the reason is known."""
    wait_for(replica, lambda: replica.idle)
    replica.park()
    wait_for(replica, lambda: replica.resting.left)
    contexts = replica.contexts
    wait_for(replica, lambda: contexts.left or contexts.why is not None)
    return contexts.left


def test_contexts_leave_and_come_back(
    demo_model: Make, runs: Path, device: str, gpu: CudaDevice
) -> None:
    model = demo_model()
    with Replica(options(model, runs, device)) as replica:
        answers(replica, model, device, seed=0)
        before = replica.pids
        for turn in range(3):
            up = gpu.available()
            left = rests(replica)
            if left:
                # What was captured meanwhile came later, and has left with them.
                assert gpu.available() - up >= 0.5 * replica.contexts.told["bytes"]
            answers(replica, model, device, seed=1 + turn)
            if not left:
                pytest.skip(f"contexts stay, and the answers are right: {replica.contexts.why}")
        assert replica.pids == before


def test_a_worker_killed_while_its_context_is_away(
    demo_model: Make, runs: Path, device: str, gpu: CudaDevice
) -> None:
    model = demo_model()
    with Replica(options(model, runs, device)) as replica:
        answers(replica, model, device, seed=0)
        rests(replica)
        os.kill(pid_of(replica, "decode"), signal.SIGKILL)
        answers(replica, model, device, seed=1)


def test_contexts_that_are_to_stay(demo_model: Make, runs: Path, device: str) -> None:
    model = demo_model()
    with Replica(options(model, runs, device, checkpoint="off")) as replica:
        answers(replica, model, device, seed=0)
        for turn in range(2):
            assert not rests(replica)
            answers(replica, model, device, seed=1 + turn)
