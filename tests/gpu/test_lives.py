"""Replicas on a GPU that lose a worker before they have their weights, and whose KV grows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.replica.replica import Replica
from tests.gpu.replicas import arriving, expect_kv_in_pieces, expected, options, pid_of
from tests.runtime.helpers import ask, finish, prompt_of, wait_for

Make = Callable[..., Path]


def test_a_prefill_worker_killed_while_weights_arrive(
    demo_model: Make, runs: Path, device: str
) -> None:
    model = demo_model()
    with arriving(model, runs, device) as replica:
        client = ask(replica, prompt_of(40), 8)
        wait_for(replica, lambda: replica.board is not None and replica.board.progress.done > 0)
        assert not replica.loaded
        os.kill(pid_of(replica, "prefill"), signal.SIGKILL)
        finish(replica, client)
    assert client.tokens == expected(model, device, tuple(prompt_of(40)), 8)


def test_kv_grows_while_requests_run(
    demo_model: Make, runs: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Much less than all requests take together.
    monkeypatch.setenv("COLDFRAME_KV_STEP", str(2 << 20))
    model = demo_model()
    prompts = [prompt_of(600 + number, seed=number) for number in range(24)]
    with Replica(options(model, runs, device, kv_bytes=256 << 20)) as replica:
        few = ask(replica, prompts[0], 16)
        finish(replica, few)
        clients = [ask(replica, prompt, 16) for prompt in prompts]
        finish(replica, *clients)
        if device != "cpu":  # where all of it is there from the beginning
            expect_kv_in_pieces(replica, 2)
    wanted = [expected(model, device, tuple(prompt), 16) for prompt in prompts]
    assert few.tokens == wanted[0]
    assert [client.tokens for client in clients] == wanted
