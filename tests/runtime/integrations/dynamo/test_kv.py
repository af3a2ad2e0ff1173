"""KV goes from prefill to decode over TCP, by its ticket, or it is computed again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import (
    cluster,
    kill,
    requests_of,
    running,
    served_by,
    stages,
    tickets,
)
from tests.runtime.serving import greedy
from tests.runtime.snapshots import eventually

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
