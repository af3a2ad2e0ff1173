"""Captured steps that outlive a replica: kept by one start, put together by the next.

The GPU is emulated (see `emulated`), its graphs the driver's: every call of ATen is a node.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.timeline import Span
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica import Replica
from tests.runtime.emulated import emulate, replays
from tests.runtime.helpers import ask, expected, finish, prompt_of, wait_for

Make = Callable[..., Path]

PROMPTS = [prompt_of(length, seed=length) for length in (1, 30, 64)]


@pytest.fixture
def graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers count what they replay."""
    place = tmp_path / "graphs"
    place.mkdir()
    emulate(monkeypatch, worker={"graphs": str(place), "drivers": True})
    return place


def serve(
    model: Path, runs: Path, store: Path, until: Callable[[list[Span]], bool], **more: object
) -> tuple[list[Span], list[list[int]]]:
    """Answers some prompts, and again once something has happened: the spans and the tokens."""
    snapshot = SnapshotOptions(mode="auto", store=str(store), create=True, **more)  # type: ignore[arg-type]
    options = ReplicaOptions(
        model=str(model), run_dir=str(runs), device="cuda:0", snapshot=snapshot
    )
    found: list[list[int]] = []
    with Replica(options) as replica:
        for _ in range(2):
            clients = [ask(replica, prompt, 16) for prompt in PROMPTS]
            finish(replica, *clients)
            assert [client.error for client in clients] == [None] * len(clients)
            found += [client.tokens for client in clients]
            wait_for(replica, lambda: until(list(replica.spans)), 60)
        return list(replica.spans), found


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


@pytest.mark.heavy
def test_what_one_start_captures_the_next_puts_together(
    demo_model: Make, no_leaks: Path, graphs: Path, tmp_path: Path
) -> None:
    model, store = demo_model("llama"), tmp_path / "store"
    wanted = [expected(model, tuple(prompt), 16) for prompt in PROMPTS] * 2
    first, tokens = serve(model, no_leaks, store, lambda spans: bool(named(spans, "graph_save")))
    assert tokens == wanted
    print([(s.name, s.note) for s in first if s.name.startswith("graph")])
    second, tokens = serve(
        model,
        no_leaks,
        store,
        lambda spans: any(" steps in " in (s.note or "") for s in named(spans, "graph_restore")),
    )
    print([(s.name, s.note) for s in second if s.name.startswith("graph")])
    assert tokens == wanted
    print(replays(graphs))
