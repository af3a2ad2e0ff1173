"""KV that was lost is computed again, and nobody takes half of it for the whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for

Make = Callable[..., Path]


@pytest.mark.heavy
def test_a_worker_that_dies_while_it_computes_kv_again(demo_model: Make, no_leaks: Path) -> None:
    model = demo_model("llama")
    prompt = prompt_of(700)
    options = ReplicaOptions(str(model), run_dir=str(no_leaks), lease_s=0.01, decode=2)
    with Replica(options) as replica:
        finish(replica, ask(replica, prompt_of(3), 2))
        client = ask(replica, prompt, 200)
        wait_for(replica, lambda: len(client.events) > 5)
        old = {name: pid for name, pid in replica.pids.items() if name.startswith("decode")}
        for pid in old.values():
            os.kill(pid, signal.SIGKILL)
        # Until others are up the lease has run out. The one that gets the request computes its KV
        # again, and dies at that; the other is there to claim what blocks the request has then.
        wait_for(replica, lambda: holder(replica, client) not in (None, *old))
        os.kill(replica.pids[holder(replica, client) or ""], signal.SIGKILL)
        finish(replica, client)
    assert client.tokens == expected(model, tuple(prompt), 200)


def holder(replica: Replica, client: Client) -> str | None:
    """The worker that has acknowledged the request."""
    found = replica._router._requests[client.request]
    return found.worker if found.acked else None
