"""Prefill and decode as workers of their own behind Dynamo: the same answers, whoever dies."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from openai import OpenAI

from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import (
    MODEL,
    Cluster,
    asked,
    kill,
    running,
    served_by,
    stages,
    tickets,
)
from tests.runtime.integrations.dynamo.test_aggregated import LONG, stream
from tests.runtime.serving import Server, greedy, together
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.dynamo


def test_both_have_their_part_of_an_answer(front: Cluster, pair: list[Server], model: Path) -> None:
    prompt = prompt_of(100, 1)
    texts: list[str] = []
    assert served_by(pair, lambda: texts.append(front.text(prompt, 12))) == [1, 1]
    assert texts == [greedy(model, tuple(prompt), 12)]


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 1},
        {"temperature": 0.9, "seed": 5},
        {"frequency_penalty": 1.5},
        {"stop": ["e"]},
        {"logprobs": 2},
    ],
)
def test_two_answer_as_one(front: Cluster, pair: list[Server], more: dict[str, object]) -> None:
    body = {"model": MODEL, "prompt": "a a a a", "max_tokens": 12, "temperature": 0, **more}
    (mine,) = pair[1].post("/v1/completions", body).json()["choices"]
    (found,) = front.post("/v1/completions", **body).json()["choices"]
    assert (found["text"], found["finish_reason"]) == (mine["text"], mine["finish_reason"])
    if "logprobs" in more:
        theirs, ours = found["logprobs"]["token_logprobs"], mine["logprobs"]["token_logprobs"]
        assert theirs == pytest.approx(ours, abs=1e-4)


def test_a_chat_comes_from_both(front: Cluster, pair: list[Server]) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is Python?"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    (mine,) = pair[1].post("/v1/chat/completions", body).json()["choices"]
    (found,) = front.post("/v1/chat/completions", **body).json()["choices"]
    assert found["message"]["content"] == mine["message"]["content"]


def test_a_streamed_chat_is_that_which_is_not(front: Cluster, pair: list[Server]) -> None:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is Python?"}],
        "max_tokens": 24,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    with OpenAI(base_url=f"{front.url}/v1", api_key="none", timeout=60) as client:
        (whole,) = client.chat.completions.create(**body).choices
        before = tickets(pair[1])
        chunks = list(client.chat.completions.create(**body, stream=True))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert {choice.delta.role for choice in choices} <= {"assistant", None}
    parts = [choice.delta.content for choice in choices if choice.delta.content]
    assert len(parts) > 5
    assert "".join(parts) == whole.message.content
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    assert reasons == [whole.finish_reason] == ["length"]
    assert choices[-1].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert tickets(pair[1]).taken == before.taken + 1


def test_the_decode_worker_takes_the_kv_and_computes_no_prompt(
    front: Cluster, pair: list[Server], model: Path
) -> None:
    _, decode = pair
    before, seen = tickets(decode), len(stages(decode))
    prompt = prompt_of(200, 77)
    assert front.text(prompt, 12) == greedy(model, tuple(prompt), 12)
    eventually(lambda: tickets(decode).taken == before.taken + 1)
    after = tickets(decode)
    assert after.lost == before.lost
    assert after.nbytes - before.nbytes == 7 * block_bytes(model)  # of 32 tokens each
    done = stages(decode)[seen:]
    assert [note for name, _, note in done if name == "handoff"] == ["from another replica"]
    assert not [name for name, _, _ in done if name.startswith("prefill")]


def test_who_hangs_up_frees_both(front: Cluster, pair: list[Server]) -> None:
    body = {"model": MODEL, "stream": True, **asked("Once", LONG)}
    with front.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        eventually(lambda: running(pair[1]) == 1)
    eventually(lambda: [running(worker) for worker in pair] == [0, 0])


def test_many_at_once(front: Cluster, pair: list[Server], model: Path) -> None:
    prompts = [prompt_of(40 + 10 * seed, seed) for seed in range(8)]
    texts = together([lambda p=p: front.text(p, 10) for p in prompts])
    assert texts == [greedy(model, tuple(p), 10) for p in prompts]


def test_a_decode_worker_that_dies_in_mid_answer_is_stood_in_for(
    front: Cluster, pair: list[Server], model: Path
) -> None:
    prompt = prompt_of(60, 5)
    with front.worker(model, role="decode") as second:
        second.ready()
        eventually(lambda: both_decode(front, [pair[1], second]), seconds=60)
        for _ in range(100):
            parts = stream(front, prompt, LONG)
            text = next(parts)
            if running(second) == 1:
                break
            parts.close()
        assert running(second) == 1
        kill(second)
        text += "".join(parts)
    assert text == greedy(model, tuple(prompt), LONG)


def test_a_prefill_worker_that_dies_under_a_request_is_stood_in_for(
    front: Cluster, pair: list[Server], model: Path
) -> None:
    """It holds requests while its weights come, and dies before they are there."""
    prompts = [prompt_of(50, 20 + seed) for seed in range(4)]
    expected = [greedy(model, tuple(p), 6) for p in prompts]
    dead = threading.Event()
    answers: list[list[str]] = []

    def ask() -> None:
        while not dead.is_set():
            answers.append(together([lambda p=p: front.text(p, 6) for p in prompts]))

    with front.worker(model, "--throttle", "20kB/s", role="prefill") as second:

        def watch() -> None:
            try:
                eventually(lambda: waiting(second) > 0, seconds=60)
            finally:
                kill(second)
                dead.set()

        together([ask, watch])
    assert answers == [expected] * len(answers)


def block_bytes(model: Path) -> int:
    """Of 32 tokens' keys and values in float32."""
    config = json.loads((model / "config.json").read_text())
    per_layer = 2 * config["num_key_value_heads"] * config["head_dim"] * 4
    return int(32 * per_layer * config["num_hidden_layers"])


def waiting(worker: Server) -> int:
    queue = worker.get("/startup").json()["queue"]
    return int(queue["running"]) + int(queue["waiting"])


def both_decode(front: Cluster, workers: list[Server]) -> bool:
    def ask() -> None:
        prompts = [prompt_of(30, seed) for seed in range(6)]
        together([lambda p=p: front.post("/v1/completions", **asked(p, 24)) for p in prompts])

    return all(served_by(workers, ask))
