"""A worker that is told to end, behind a front end that takes nothing to another one by itself."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.helpers import prompt_of
from tests.runtime.integrations.dynamo.cluster import (
    MODEL,
    Cluster,
    asked,
    cluster,
    requests_of,
    running,
    served_by,
)
from tests.runtime.integrations.dynamo.test_aggregated import LONG, several, stream
from tests.runtime.serving import greedy
from tests.runtime.snapshots import eventually

pytestmark = pytest.mark.dynamo


@pytest.fixture(scope="module")
def front() -> Iterator[Cluster]:
    with cluster(migrations=0) as made:
        yield made


def test_an_open_answer_is_given_to_its_end(front: Cluster, model: Path) -> None:
    prompt = prompt_of(30, 1)
    with front.worker(model) as worker:
        front.ready()
        parts = stream(front, prompt, LONG)
        text = next(parts)
        assert running(worker) == 1
        worker.process.terminate()
        text += "".join(parts)
        assert worker.process.wait(60) == 0
    assert text == greedy(model, tuple(prompt), LONG)


def test_the_others_take_over_and_no_request_is_lost(front: Cluster, model: Path) -> None:
    """Those among them that still come to it while front ends hear of its end."""
    grace = {"DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "5"}
    expected = {seed: greedy(model, tuple(prompt_of(60, seed)), 16) for seed in range(6)}
    wrong: list[str] = []
    over = threading.Event()

    def load(seed: int) -> None:
        while not over.is_set():
            answer = front.post("/v1/completions", **asked(prompt_of(60, seed), 16))
            if answer.status_code != 200:
                wrong.append(answer.text)
            elif answer.json()["choices"][0]["text"] != expected[seed]:
                wrong.append(json.dumps(answer.json()))

    with front.worker(model) as stays, front.worker(model, **grace) as leaves:
        for worker in (stays, leaves):
            worker.ready()
        front.ready()
        eventually(lambda: all(served_by([stays, leaves], lambda: several(front))), seconds=60)
        before = requests_of(leaves)
        threads = [threading.Thread(target=load, args=(seed,)) for seed in expected]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: requests_of(leaves) > before, seconds=60)
            leaves.process.terminate()
            assert leaves.process.wait(60) == 0
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert front.models() == [MODEL]
    assert wrong == []
