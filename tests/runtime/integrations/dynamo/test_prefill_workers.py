"""Several prefill workers beside one that decodes: who gets a prompt, who comes, goes and dies."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import (
    Cluster,
    asked,
    kill,
    requests_of,
    served_by,
)
from tests.runtime.serving import Server, greedy, together
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.dynamo

Make = Callable[..., Path]
HEAD = 320
"""Tokens of a prompt that a worker has KV of: ten blocks."""
LONG = 2000
"""Tokens of a prompt that a core computes for more than a second, in four chunks."""
BEGUN_S = 0.1
"""Of a core's time: more than a worker takes for anything else, a fraction of such a prompt's."""


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("qwen3", "float32", "small")


@contextmanager
def load(front: Cluster, model: Path) -> Iterator[None]:
    """Several clients ask one request after another meanwhile; each is answered, and rightly."""
    prompts = [tuple(prompt_of(60, seed)) for seed in range(4)]
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    wrong: list[str] = []
    over = threading.Event()

    def ask(prompt: tuple[int, ...], text: str) -> None:
        while not over.is_set():
            answer = front.post("/v1/completions", **asked(prompt, 12))
            if answer.status_code != 200 or answer.json()["choices"][0]["text"] != text:
                wrong.append(answer.text)

    threads = [
        threading.Thread(target=ask, args=pair) for pair in zip(prompts, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def spread(front: Cluster) -> None:
    """Asks for so much at once, each with a prompt of its own, that it is spread."""
    seeds = range(200, 206)
    together([lambda seed=seed: front.text(prompt_of(200, seed), 2) for seed in seeds])


def known(front: Cluster, workers: list[Server]) -> bool:
    """Whether requests go to each of the workers."""
    return all(served_by(workers, lambda: spread(front)))


def has(worker: Server, head: list[int]) -> None:
    """Has a worker compute a prompt of its own choice; the router hears of that by events alone."""
    body = {"prompt": head, "max_tokens": 1, "ignore_eos": True}
    assert worker.post("/v1/completions", body).status_code == 200


def goes_to(front: Cluster, workers: list[Server], place: int, prompt: list[int]) -> bool:
    """Whether a prompt is sent to that one of them."""
    expected = [int(number == place) for number in range(len(workers))]
    return served_by(workers, lambda: front.text(prompt, 2)) == expected


def test_a_prompt_goes_to_the_prefill_worker_that_has_its_beginning(
    front: Cluster, pair: list[Server], model: Path
) -> None:
    with front.worker(model, role="prefill") as second:
        second.ready()
        prefills = [pair[0], second]
        eventually(lambda: known(front, prefills), seconds=60)
        for seed, place in enumerate((0, 1, 1, 0)):
            head = prompt_of(HEAD, 50 + seed)
            has(prefills[place], head)
            eventually(partial(goes_to, front, prefills, place, [*head, 5]), seconds=30)
            prompt, texts = [*head, 6], []
            expected = [int(number == place) for number in range(2)]
            ask = partial(front.text, prompt, 4)
            assert served_by(prefills, lambda ask=ask, texts=texts: texts.append(ask())) == expected
            assert texts == [greedy(model, tuple(prompt), 4)]


def test_a_prefill_worker_that_comes_under_load_is_used(
    front: Cluster, pair: list[Server], model: Path
) -> None:
    with front.worker(model, role="prefill") as second, load(front, model):
        eventually(lambda: requests_of(second) > 0, seconds=60)


def test_a_decode_worker_that_comes_under_load_is_used(
    front: Cluster, pair: list[Server], model: Path
) -> None:
    with front.worker(model, role="decode") as second, load(front, model):
        eventually(lambda: requests_of(second) > 0, seconds=60)


def test_a_prefill_worker_that_leaves_under_load_loses_no_request(
    front: Cluster, pair: list[Server], model: Path
) -> None:
    with front.worker(model, role="prefill") as second:
        second.ready()
        eventually(lambda: known(front, [pair[0], second]), seconds=60)
        with load(front, model):
            before, stays = requests_of(second), requests_of(pair[0])
            eventually(lambda: requests_of(second) > before, seconds=60)
            second.process.terminate()
            assert second.process.wait(60) == 0
            eventually(lambda: requests_of(pair[0]) > stays, seconds=60)


def test_a_prefill_worker_that_dies_in_mid_prompt_is_stood_in_for(
    front: Cluster, pair: list[Server], model: Path
) -> None:
    """It has computed a part of the prompt, and nobody has any of that."""
    head = prompt_of(HEAD, 90)
    prompt, texts = [*head, *prompt_of(LONG - HEAD, 91)], []
    expected = greedy(model, tuple(prompt), 8)
    with front.worker(model, role="prefill") as second:
        second.ready()
        prefills = [pair[0], second]
        eventually(lambda: known(front, prefills), seconds=60)
        has(second, head)
        eventually(partial(goes_to, front, prefills, 1, [*head, 5]), seconds=30)
        computes = second.worker("prefill")
        answered = [requests_of(worker) for worker in prefills]

        def die() -> None:
            try:
                eventually(lambda: to_compute(second) >= LONG - HEAD, seconds=60)
                idle = sum(computes.cpu_times()[:2])
                computes.send_signal(signal.SIGCONT)
                eventually(lambda: sum(computes.cpu_times()[:2]) - idle > BEGUN_S, seconds=60)
                computes.send_signal(signal.SIGSTOP)
                assert to_compute(second) >= LONG - HEAD
                assert [requests_of(worker) for worker in prefills] == answered
            finally:
                kill(second)

        computes.send_signal(signal.SIGSTOP)  # until it is known that the prompt has come
        together([lambda: texts.append(front.text(prompt, 8)), die])
        assert texts == [expected]
        assert requests_of(pair[0]) == answered[0] + 1


def to_compute(worker: Server) -> int:
    """Prompt tokens that its prefill has not done with."""
    return int(worker.metrics()["coldframe_prefill_tokens_waiting"])
