"""Prompts of all lengths at once, in a replica of real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for

Make = Callable[..., Path]


@pytest.mark.heavy
def test_short_prompts_do_not_wait_for_long_ones(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    lengths = (1000, 980, 960, 940, 3)
    with Replica(ReplicaOptions(str(model), run_dir=str(no_leaks))) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        prompts = [prompt_of(length, seed=length) for length in lengths]
        *long, short = clients = [ask(replica, prompt, 12) for prompt in prompts]
        wait_for(replica, lambda: bool(short.events))
        assert not all(client.events for client in long)
        finish(replica, *clients)
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.tokens == expected(model, tuple(prompt), 12)


@pytest.mark.heavy
def test_a_long_prompt_that_nobody_waits_for_is_left(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    with Replica(ReplicaOptions(str(model), run_dir=str(no_leaks))) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        gone = [ask(replica, prompt_of(1000, seed=seed), 12) for seed in range(8)]
        for client in gone:
            replica.cancel(client.request)
        last: Client = ask(replica, prompt_of(900), 12)
        finish(replica, last)
        assert last.tokens == expected(model, tuple(prompt_of(900)), 12)
        assert not any(client.events for client in gone)

        def free() -> bool:
            replica.ask_usage()
            return replica.usage.get("kv_used") == 0

        wait_for(replica, free)
