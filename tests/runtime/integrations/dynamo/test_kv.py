"""KV goes from prefill to decode by its ticket, over TCP or NIXL, or it is computed again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from coldframe.loader.transport.nixl import nixl_package
from tests.loader.transport.relay import Relay
from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import (
    cluster,
    free_port,
    kill,
    requests_of,
    running,
    served_by,
    stages,
    tickets,
)
from tests.runtime.serving import greedy
from tests.runtime.snapshots import eventually
from tests.support import unavailable

pytestmark = pytest.mark.dynamo

Make = Callable[..., Path]
WAY = ("--kv-ways", "tcp", "--kv-listen", "127.0.0.1:0")
SECRET = "the secret of these two workers"


def test_a_ticket_is_taken_and_one_whose_sender_is_gone_is_not_needed(demo_model: Make) -> None:
    model = demo_model("qwen3", "float32")
    with cluster() as front, ExitStack() as stack:
        prefill, decode = (
            stack.enter_context(front.worker(model, *WAY, role=role, COLDFRAME_KV_SECRET=SECRET))
            for role in ("prefill", "decode")
        )
        for worker in (prefill, decode):
            worker.ready()
        front.ready()
        both = [prefill, decode]
        eventually(lambda: served_by(both, lambda: front.text("Once", 4)) == [1, 1], seconds=60)

        before, seen = tickets(decode), len(stages(decode))
        prompt = prompt_of(150, 3)
        assert front.text(prompt, 12) == greedy(model, tuple(prompt), 12)
        eventually(lambda: tickets(decode).taken == before.taken + 1)
        after = tickets(decode)
        assert after.lost == before.lost
        assert after.nbytes > before.nbytes
        assert not [name for name, *_ in stages(decode)[seen:] if name.startswith("prefill")]

        # The decode worker stands still until the ticket is there and nobody is behind it.
        before, seen, answered = after, len(stages(decode)), requests_of(prefill)
        prompt, texts = prompt_of(150, 4), []
        asking = threading.Thread(target=lambda: texts.append(front.text(prompt, 12)))
        still = decode.worker("decode")
        still.send_signal(signal.SIGSTOP)
        try:
            asking.start()
            eventually(lambda: requests_of(prefill) == answered + 1 and running(decode) == 1)
            kill(prefill)
        finally:
            still.send_signal(signal.SIGCONT)
        asking.join()
        assert texts == [greedy(model, tuple(prompt), 12)]
        eventually(lambda: tickets(decode).lost == before.lost + 1)
        assert tickets(decode) == before._replace(lost=before.lost + 1)
        done = stages(decode)[seen:]
        (note,) = [note for name, _, note in done if name == "handoff"]
        assert note.startswith("computed again: ")
        assert [note for name, _, note in done if name == "prefill"] == ["between decode steps"]


def test_a_prefill_worker_that_dies_while_its_kv_is_read_is_not_needed(demo_model: Make) -> None:
    """By NIXL, which has told the decode worker where to read, and then brings nothing."""
    if nixl_package() is None:
        unavailable("there is no NIXL: pip install 'coldframe[nixl]'")
    model = demo_model("qwen3", "float32")
    at, elsewhere = free_port(), "127.0.0.2"
    # By shared memory nothing would be needed of who is read from.
    env = {"COLDFRAME_KV_SECRET": SECRET, "UCX_TLS": "tcp"}
    ways = ("--kv-ways", "nixl")
    given = (*ways, "--kv-listen", f"127.0.0.1:{at}", "--kv-advertise", elsewhere)
    with cluster() as front, ExitStack() as stack:
        relay = stack.enter_context(Relay(f"127.0.0.1:{at}", host=elsewhere, port=at))
        relay.pass_on()
        prefill = stack.enter_context(front.worker(model, *given, role="prefill", **env))
        decode = stack.enter_context(front.worker(model, *ways, role="decode", **env))
        for worker in (prefill, decode):
            worker.ready()
        front.ready()
        both = [prefill, decode]
        eventually(lambda: served_by(both, lambda: front.text("Once", 4)) == [1, 1], seconds=60)
        before, seen = tickets(decode), len(stages(decode))
        assert before.taken > 0
        assert before.lost == 0

        relay.hold()
        prompt, texts = prompt_of(150, 4), []
        asking = threading.Thread(target=lambda: texts.append(front.text(prompt, 12)))
        asking.start()
        assert relay.held.wait(60)
        (memory,) = prefill.memory_services()
        memory.suspend()
        relay.pass_on()
        memory.kill()
        kill(prefill)
        asking.join()
        assert texts == [greedy(model, tuple(prompt), 12)]
        assert tickets(decode) == before._replace(lost=before.lost + 1)
        (note,) = [note for name, _, note in stages(decode)[seen:] if name == "handoff"]
        assert note.startswith("computed again: ")
