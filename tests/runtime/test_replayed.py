"""Replicas whose decode workers replay captured steps, on an emulated GPU; see `emulated`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import Replica
from tests.runtime.emulated import emulate, replays
from tests.runtime.helpers import ask, expected, finish, prompt_of

Make = Callable[..., Path]


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers count what they replay."""
    place = tmp_path / "graphs"
    place.mkdir()
    emulate(monkeypatch, worker={"graphs": str(place)})
    return place


def options(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    return ReplicaOptions(model=str(model), run_dir=str(runs), device="cuda:0", **more)  # type: ignore[arg-type]


def test_replayed_steps_make_the_same_tokens(
    demo_model: Make, no_leaks: Path, graphs: Path
) -> None:
    model = demo_model("llama")
    prompts = [prompt_of(length, seed=length) for length in (1, 30, 64)]
    with Replica(options(model, no_leaks)) as replica:
        clients = [ask(replica, prompt, 16) for prompt in prompts]
        finish(replica, *clients)
        spans = [span for span in replica.spans if span.name == "graph_capture"]
        first = min(span.end_ns for span in replica.spans if span.name == "prefill[head]")
    for prompt, client in zip(prompts, clients, strict=True):
        assert client.error is None
        assert client.tokens == expected(model, tuple(prompt), 16)
    assert sum(replays(graphs).values()) > 5
    assert spans
    assert all("failed" not in (span.note or "") for span in spans)
    assert all(span.start_ns > first for span in spans)
