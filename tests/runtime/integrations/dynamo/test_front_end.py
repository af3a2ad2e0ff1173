"""What Dynamo's front end makes of a worker: its tokens, its load, and the generation it is of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.runtime.checkpoints.demo_tokenizer import BOS
from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import (
    MODEL,
    Cluster,
    asked,
    cluster,
    served_by,
)
from tests.runtime.integrations.dynamo.test_aggregated import LONG
from tests.runtime.serving import Server, greedy, ids_of, tokenizer
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.dynamo

Make = Callable[..., Path]
TEXT = "Once upon a time"
FULL = ("--active-decode-blocks-threshold", "0.0")
"""A worker with any KV in use gets nothing more."""


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    """One whose tokenizer puts a begin-of-text token in front, as Llama's does."""
    return demo_model("llama", "float32")


@pytest.fixture(scope="module")
def worker(front: Cluster, model: Path) -> Iterator[Server]:
    with front.worker(model, DYN_NAMESPACE_WORKER_SUFFIX="old") as found:
        found.ready()
        front.ready()
        yield found


# -- tokens ----------------------------------------------------------------------------------------


def test_a_text_gets_no_token_of_the_tokenizers_own_in_front(
    front: Cluster, worker: Server, model: Path
) -> None:
    """As with any worker of Dynamo's: what comes here are token ids. Our gateway puts it there."""
    with_bos = ids_of(model, TEXT)
    without = tuple(tokenizer(model).encode(TEXT, add_special_tokens=False).ids)
    assert with_bos == (tokenizer(model).token_to_id(BOS), *without)
    ours = worker.post("/v1/completions", body(TEXT)).json()
    theirs = front.complete(TEXT)
    assert counted(ours) == len(with_bos)
    assert counted(theirs) == len(without)
    assert said(ours) == greedy(model, with_bos, 8)
    assert said(theirs) == greedy(model, without, 8)


def test_the_token_may_be_in_the_text(front: Cluster, worker: Server, model: Path) -> None:
    theirs = front.complete(BOS + TEXT)
    assert counted(theirs) == len(ids_of(model, TEXT))
    assert said(theirs) == greedy(model, ids_of(model, TEXT), 8)


def test_token_ids_are_what_they_are(front: Cluster, worker: Server, model: Path) -> None:
    ids = list(ids_of(model, TEXT))
    ours, theirs = worker.post("/v1/completions", body(ids)).json(), front.complete(ids)
    assert (counted(theirs), said(theirs)) == (counted(ours), said(ours)) == (len(ids), said(ours))


def test_a_chats_template_has_it_once(front: Cluster, worker: Server) -> None:
    asks = {"model": MODEL, "messages": [{"role": "user", "content": TEXT}], "temperature": 0}
    ours = worker.post("/v1/chat/completions", {**asks, "max_tokens": 8}).json()
    theirs = front.post("/v1/chat/completions", **{**asks, "max_tokens": 8}).json()
    assert counted(theirs) == counted(ours)
    (mine,), (found,) = ours["choices"], theirs["choices"]
    assert found["message"]["content"] == mine["message"]["content"]


def body(prompt: object) -> dict[str, Any]:
    return {"model": MODEL, "temperature": 0, **asked(prompt, 8)}


def counted(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens"])


def said(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


# -- load ------------------------------------------------------------------------------------------


def test_a_router_hears_of_the_load_that_others_send(front: Cluster, worker: Server) -> None:
    """What it sends itself it counts itself; of all else it knows what workers tell."""
    over = threading.Event()

    def load(seed: int) -> None:
        while not over.is_set():
            front.post("/v1/completions", **asked(prompt_of(40, seed), LONG))

    with cluster(*FULL, beside=front) as other:
        other.ready()
        threads = [threading.Thread(target=load, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: not other.answers(), seconds=60)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        eventually(other.answers, seconds=60)


# -- generations -----------------------------------------------------------------------------------


def test_workers_of_two_generations_serve_a_model_together(
    front: Cluster, worker: Server, model: Path
) -> None:
    """As in a rolling update: each in a namespace of its own, the front end takes both."""
    with front.worker(model, DYN_NAMESPACE_WORKER_SUFFIX="new") as newer:
        newer.ready()
        assert '"path": "dynamo-new.backend.generate"' in newer.log
        assert "backend/generate" in front.registered("dynamo-old")
        assert "backend/generate" in front.registered("dynamo-new")
        assert front.registered("dynamo") == []
        asks = [prompt_of(20, seed) for seed in range(12)]

        def ask() -> None:
            for prompt in asks:
                assert front.text(prompt, 4) == greedy(model, tuple(prompt), 4)

        eventually(lambda: all(served_by([worker, newer], ask)), seconds=60)
    assert front.text(asks[0], 4) == greedy(model, tuple(asks[0]), 4)
