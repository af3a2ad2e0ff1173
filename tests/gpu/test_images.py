"""Workers out of an image with their contexts and captured steps: they answer as fresh ones do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks.gpu.probes import answer
from coldframe.benchmarks.gpu.report import LeftOut
from coldframe.benchmarks.gpu.restored import ABLE, create
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from tests.gpu.replicas import expected, options
from tests.runtime.helpers import ask, finish, prompt_of

Make = Callable[..., Path]

_ABLE_S = 30.0


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model("llama", "float32")


@pytest.fixture(scope="module")
def store(model: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an image of a worker on the GPU; a skip where CRIU or the driver make none."""
    try:
        for probe in ABLE if device != "cpu" else ABLE[:1]:
            answer(probe, device, _ABLE_S)
    except LeftOut as error:
        pytest.skip(str(error))
    place = tmp_path_factory.mktemp("store")
    create(model, place, device, 60.0)
    return place


def answers(replica: Replica, model: Path, device: str) -> None:
    prompts = [prompt_of(length, seed=length) for length in (1, 40, 200)]
    clients = [ask(replica, prompt, 24) for prompt in prompts]
    finish(replica, *clients)
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.error is None, client.error
        assert client.tokens == expected(model, device, tuple(prompt), 24)


def test_clones_answer(model: Path, store: Path, runs: Path, device: str) -> None:
    snapshot = SnapshotOptions("require", str(store))
    with Replica(options(model, runs, device, snapshot=snapshot)) as replica:
        answers(replica, model, device)
        assert replica.facts["snapshot"]["tier"] == "image"
        if device != "cpu":
            restored = [span for span in replica.spans if span.name == "cuda_restore"]
            assert len(restored) == 2
        # What they came with they do not make once more.
        assert not [span for span in replica.spans if span.name == "graph_capture"]


def test_clones_rest_and_wake(model: Path, store: Path, runs: Path, device: str) -> None:
    snapshot = SnapshotOptions("require", str(store))
    with Replica(options(model, runs, device, snapshot=snapshot)) as replica:
        for _ in range(2):
            answers(replica, model, device)
            replica.run_until(lambda: replica.idle)
            replica.park()
            replica.run_until(lambda: replica.resting.left or device == "cpu")
        answers(replica, model, device)


def test_without_criu_workers_start_fresh(
    model: Path, store: Path, runs: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_CRIU", "/nonexistent/criu")
    snapshot = SnapshotOptions("auto", str(store))
    with Replica(options(model, runs, device, snapshot=snapshot)) as replica:
        answers(replica, model, device)
        assert replica.facts["snapshot"]["tier"] == "fresh"
