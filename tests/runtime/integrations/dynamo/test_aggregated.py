"""Two whole replicas behind Dynamo's front end and KV router: the answers of our own gateway."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import (
    MODEL,
    Cluster,
    asked,
    kill,
    running,
    served_by,
)
from tests.runtime.serving import Server, greedy, together
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.dynamo

LONG = 900
"""So many tokens take long enough to do something meanwhile."""


@pytest.fixture(scope="module")
def workers(model: Path, front: Cluster) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        found = [stack.enter_context(front.worker(model)) for _ in range(2)]
        for worker in found:
            worker.ready()
        front.ready()
        # Both are known to the router.
        eventually(lambda: all(served_by(found, lambda: several(front))), seconds=60)
        yield found


def several(front: Cluster) -> None:
    """Asks for so much at once that it is spread."""
    together([lambda seed=seed: front.text(prompt_of(40, seed + 100), 24) for seed in range(6)])


BODIES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "Once upon a time", "max_tokens": 12},
    "ids": {"prompt": prompt_of(50), "max_tokens": 5},
    "stop": {"prompt": "def main", "max_tokens": 40, "stop": ["e", "\n"]},
    "seeded": {"prompt": "def main", "max_tokens": 16, "temperature": 0.9, "top_p": 0.8, "seed": 5},
    "penalties": {"prompt": "a a a a", "max_tokens": 12, "frequency_penalty": 1.5},
    "logprobs": {"prompt": "import os", "max_tokens": 3, "logprobs": 2},
}


@pytest.mark.parametrize("name", BODIES)
def test_a_completion_is_that_of_our_gateway(
    front: Cluster, workers: list[Server], name: str
) -> None:
    body = {"model": MODEL, "temperature": 0, **BODIES[name]}
    ours, theirs = workers[0].post("/v1/completions", body), front.post("/v1/completions", **body)
    assert (ours.status_code, theirs.status_code) == (200, 200), theirs.text
    (mine,), (found,) = ours.json()["choices"], theirs.json()["choices"]
    assert (found["text"], found["finish_reason"]) == (mine["text"], mine["finish_reason"])
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert theirs.json()["usage"][count] == ours.json()["usage"][count]
    if "logprobs" in body:
        assert found["logprobs"]["token_logprobs"] == pytest.approx(
            mine["logprobs"]["token_logprobs"], abs=1e-4
        )
        # The likeliest of each place.
        assert [max(top.values()) for top in found["logprobs"]["top_logprobs"]] == pytest.approx(
            [max(top.values()) for top in mine["logprobs"]["top_logprobs"]], abs=1e-4
        )


def test_a_chat_is_that_of_our_gateway(front: Cluster, workers: list[Server]) -> None:
    body = {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are terse."},
            {"role": "user", "content": "What is Python?"},
        ],
        "max_tokens": 12,
        "temperature": 0,
    }
    ours = workers[0].post("/v1/chat/completions", body).json()
    theirs = front.post("/v1/chat/completions", **body).json()
    (mine,), (found,) = ours["choices"], theirs["choices"]
    assert found["message"]["content"] == mine["message"]["content"]
    assert found["finish_reason"] == mine["finish_reason"]
    assert theirs["usage"]["prompt_tokens"] == ours["usage"]["prompt_tokens"]


def test_choices_are_several(front: Cluster, workers: list[Server]) -> None:
    body = {"prompt": "Once", "max_tokens": 6, "temperature": 1.0, "seed": 3, "n": 2}
    answers = [
        worker.post("/v1/completions", {"model": MODEL, **body}).json() for worker in workers
    ]
    found = front.post("/v1/completions", **body).json()["choices"]
    texts = [sorted(c["text"] for c in answer["choices"]) for answer in answers]
    assert texts[0] == texts[1] == sorted(choice["text"] for choice in found)


def test_a_stream_comes_token_by_token(front: Cluster, workers: list[Server], model: Path) -> None:
    prompt = prompt_of(20)
    parts = list(stream(front, prompt, 20))
    assert len(parts) > 5
    assert "".join(parts) == greedy(model, tuple(prompt), 20)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, {"prompt": prompt_of(20), "max_tokens": 1 << 20}),
        (400, {"prompt": "Once", "max_tokens": 4, "min_tokens": 2}),
        (404, {"prompt": "Once", "model": "another"}),
    ],
)
def test_what_there_is_not_is_an_error_of_the_clients(
    front: Cluster, workers: list[Server], status: int, body: dict[str, Any]
) -> None:
    answer = front.post("/v1/completions", **body)
    assert answer.status_code == status, answer.text


def is_routed(
    front: Cluster, workers: list[Server], prompt: list[int], expected: list[int]
) -> bool:
    """Whether a prompt goes to the worker that it is expected at."""
    return served_by(workers, lambda: front.text(prompt, 1)) == expected


def test_a_prompt_goes_to_the_worker_that_has_its_kv(
    front: Cluster, workers: list[Server], model: Path
) -> None:
    """Also where no request for it has come through the front end: by events alone."""
    for seed, place in enumerate((0, 1, 1, 0)):
        prompt = prompt_of(800, 50 + seed)
        # A worker of its own choice computes it; the router hears of that.
        body = {"prompt": prompt, "max_tokens": 1, "ignore_eos": True}
        assert workers[place].post("/v1/completions", body).status_code == 200
        expected = [int(number == place) for number in range(2)]
        routed = partial(is_routed, front, workers, [*prompt, 5], expected)
        eventually(routed, seconds=30)
        found = front.complete([*prompt, 6], 4)
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= 768
        assert found["choices"][0]["text"] == greedy(model, (*prompt, 6), 4)


def test_who_hangs_up_frees_the_worker(front: Cluster, workers: list[Server]) -> None:
    with front.http.stream(
        "POST", "/v1/completions", json={"model": MODEL, "stream": True, **asked("Once", LONG)}
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        eventually(lambda: sum(map(running, workers)) == 1)
    eventually(lambda: sum(map(running, workers)) == 0)
    gone = sum(w.metrics()["coldframe_request_failure_total{gone}"] for w in workers)
    assert gone == 1


def lose_replica(worker: Server) -> None:
    """Its front lives, and has no answer any more."""
    (memory,) = worker.memory_services()
    memory.kill()


@pytest.mark.parametrize("dies", [kill, lose_replica])
def test_a_worker_that_dies_in_mid_answer_is_stood_in_for(
    front: Cluster, workers: list[Server], model: Path, dies: Callable[[Server], None]
) -> None:
    with front.worker(model) as third:
        third.ready()
        # The next one goes there: it has the prompt, and the others have not.
        warm = {"prompt": prompt_of(96, 4), "max_tokens": 1, "ignore_eos": True}
        assert third.post("/v1/completions", warm).status_code == 200
        prompt = [*prompt_of(96, 4), 9]

        begun: list[tuple[Generator[str, None, None], str]] = []

        def began() -> bool:
            eventually(lambda: not any(running(each) for each in (*workers, third)))
            parts = stream(front, prompt, LONG)
            begun[:] = [(parts, next(parts))]
            if running(third) == 1:
                return True
            parts.close()  # the router did not know of it yet
            return False

        eventually(began, seconds=60)
        ((parts, text),) = begun
        dies(third)
        text += "".join(parts)
    assert text == greedy(model, tuple(prompt), LONG)


def test_workers_come_and_go_under_load(front: Cluster, workers: list[Server], model: Path) -> None:
    wrong: list[str] = []
    over = threading.Event()
    expected = {seed: greedy(model, tuple(prompt_of(60, seed)), 16) for seed in range(4)}

    def load(seed: int) -> None:
        while not over.is_set():
            answer = front.post("/v1/completions", **asked(prompt_of(60, seed), 16))
            if answer.status_code != 200:
                wrong.append(answer.text)
            elif answer.json()["choices"][0]["text"] != expected[seed]:
                wrong.append(json.dumps(answer.json()))

    threads = [threading.Thread(target=load, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    try:
        # It gets requests before its weights are there, and ends with status 0 among them.
        with front.worker(model, "--throttle", "2MB/s") as third:
            eventually(lambda: third.metrics().get(SUCCESS, 0) > 0, seconds=60)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []


SUCCESS = "coldframe_request_success_total{length}"


def stream(front: Cluster, prompt: list[int], count: int) -> Generator[str, None, None]:
    """The parts of an answer as they come."""
    body = {"model": MODEL, "temperature": 0, "stream": True, **asked(prompt, count)}
    with front.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                if choice["text"]:
                    yield choice["text"]
