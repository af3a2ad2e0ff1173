"""One replica on a GPU that rests, wakes, and loses its workers: answers stay right."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.replica.replica import Replica
from tests.gpu.replicas import expected, pid_of
from tests.runtime.helpers import ask, finish, prompt_of, wait_for

Make = Callable[..., Path]


def test_parked_and_woken(shared: Replica, demo_model: Make, device: str) -> None:
    for turn in range(3):
        prompt = prompt_of(100, seed=turn)
        client = ask(shared, prompt, 12)
        finish(shared, client)
        assert client.tokens == expected(demo_model(), device, tuple(prompt), 12)
        wait_for(shared, lambda: shared.idle)
        shared.park()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_killed_in_mid_stream(
    shared: Replica, demo_model: Make, device: str, role: str
) -> None:
    prompts = [prompt_of(length, seed=length) for length in (5, 33, 80)]
    clients = [ask(shared, prompt, 100) for prompt in prompts]
    wait_for(shared, lambda: all(len(client.events) > 5 for client in clients))
    os.kill(pid_of(shared, role), signal.SIGKILL)
    finish(shared, *clients)
    late = ask(shared, prompt_of(40), 8)
    finish(shared, late)
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.tokens == expected(demo_model(), device, tuple(prompt), 100)
    assert late.tokens == expected(demo_model(), device, tuple(prompt_of(40)), 8)
