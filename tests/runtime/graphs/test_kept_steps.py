"""Captured steps that outlive a replica: kept by one start, put together by the next.

The GPU is emulated (see `emulated`), its graphs the driver's: every call of ATen is a node.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.timeline import Span
from coldframe.runtime.gateway.preload import may_import
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.snapshot.graph_file import decode
from coldframe.snapshot.identity import Identity
from tests.runtime.emulated import emulate, replays
from tests.runtime.helpers import ask, expected, finish, prompt_of, wait_for

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]

Make = Callable[..., Path]

PROMPTS = [prompt_of(length, seed=length) for length in (1, 30, 64)]
NOBODY = Identity(65532, 65532, ())


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """Where workers count what they replay."""
    place = tmp_path / "replayed"
    place.mkdir()
    place.chmod(0o777)  # whoever they run as
    return place


class Starts:
    """Replicas of one model, one after the other, that keep steps in one store."""

    def __init__(self, model: Path, runs: Path, store: Path) -> None:
        self.model = model
        self.store = store
        self._runs = runs

    @property
    def archive(self) -> Path:
        """The only file of steps that there is."""
        (path,) = (self.store / "graphs").glob("*.graphs")
        return path

    def run(
        self, until: str, *, mode: str = "auto", create: bool = True, user: Identity | None = None
    ) -> list[Span]:
        """Answers some prompts, and one alone once a span of that name was told: all spans."""
        snapshot = SnapshotOptions(mode=mode, store=str(self.store), create=create)
        options = ReplicaOptions(
            model=str(self.model),
            run_dir=str(self._runs),
            device="cuda:0",
            snapshot=snapshot,
            user=user,
        )
        with Replica(options) as replica:
            for prompts in (PROMPTS, PROMPTS[1:2]):
                clients = [ask(replica, prompt, 16) for prompt in prompts]
                finish(replica, *clients)
                for prompt, client in zip(prompts, clients, strict=True):
                    assert client.error is None
                    assert client.tokens == expected(self.model, tuple(prompt), 16)
                wait_for(replica, lambda: bool(named(list(replica.spans), until)), 120)
            return [*replica.spans, *replica.recorder.drain()]


@pytest.fixture
def starts(demo_model: Make, no_leaks: Path, tmp_path: Path) -> Starts:
    model = tmp_path / "model"
    shutil.copytree(demo_model("llama"), model)
    config = model / "config.json"
    # Shorter sequences, and so fewer steps to capture.
    told = json.loads(config.read_text()) | {"max_position_embeddings": 256}
    config.write_text(json.dumps(told))
    return Starts(model, no_leaks, tmp_path / "store")


def named(spans: list[Span], name: str) -> list[str]:
    """What spans of a name say; of what was looked for and not found, nothing."""
    found = [span.note or "" for span in spans if span.name == name]
    return [note for note in found if not note.startswith("none: ")]


def reasons(spans: list[Span]) -> str:
    return "; ".join(span.note or "" for span in spans if span.name == "graph_restore")


def test_what_one_start_captures_the_next_puts_together(
    starts: Starts, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, worker={"drivers": str(counted)})
    # Where it can be, as somebody who can write nowhere.
    user = NOBODY if os.geteuid() == 0 and may_import(NOBODY) else None
    first = starts.run("graph_save", user=user)
    assert "none: there is no archive of graphs for this model" in reasons(first)
    captured = len(named(first, "graph_capture"))
    assert captured > 3
    assert named(first, "graph_save")[0].startswith(f"{captured} steps, ")
    assert starts.archive.stat().st_uid == os.geteuid()
    written = starts.archive.read_bytes()
    before = replays(counted)
    assert sum(before.values()) > 0

    second = starts.run("graph_restore", user=user)
    assert len(named(second, "graph_capture")) == 1
    assert named(second, "graph_restore")[0].startswith(f"{captured - 1} steps in ")
    assert named(second, "graph_save") == []
    drawn = min(span.end_ns for span in second if span.name == "prefill[head]")
    assert all(span.start_ns > drawn for span in second if span.name == "graph_restore")
    assert starts.archive.read_bytes() == written
    (place,) = (path for path in counted.iterdir() if int(path.name) not in before)
    assert place.read_bytes().count(b"r") > 10


def test_a_damaged_archive_is_as_none_and_another_takes_its_place(
    starts: Starts, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, worker={"drivers": str(counted)})
    starts.run("graph_save")
    whole = starts.archive.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    starts.archive.write_bytes(damaged)
    again = starts.run("graph_save")
    assert "the archive of graphs is damaged" in reasons(again)
    assert len(named(again, "graph_capture")) > 3
    # What was captured in another order lies elsewhere in the worker's memory.
    kept, before = (decode(raw, "here") for raw in (starts.archive.read_bytes(), whole))
    assert kept.fingerprint == before.fingerprint
    assert set(kept.graphs) == set(before.graphs)


def test_what_cannot_be_put_together_is_captured(
    starts: Starts, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = {"drivers": str(counted)}
    with monkeypatch.context() as patch:
        emulate(patch, worker=worker)
        first = starts.run("graph_save")
    refusal = ("cuGraphInstantiate", 3, "CUDA_ERROR_NOT_SUPPORTED")  # the second that is rebuilt
    emulate(monkeypatch, worker={**worker, "fail": refusal})
    second = starts.run("graph_restore")
    (note,) = named(second, "graph_restore")
    count = len(named(first, "graph_capture"))
    assert note.startswith(f"{count - 2} steps in ")
    assert "1 not: " in note
    assert "CUDA_ERROR_NOT_SUPPORTED" in note


def test_a_step_that_loses_its_worker_costs_one_worker_and_the_archive(
    starts: Starts, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        emulate(patch, worker={"drivers": str(counted)})
        first = starts.run("graph_save")
    steps, before = len(named(first, "graph_capture")), set(replays(counted))
    archive = starts.archive
    emulate(monkeypatch, worker={"drivers": str(counted), "lose_at_replay": True})
    second = starts.run("graph_capture")
    (note,) = named(second, "graph_trial")
    assert note.endswith("was lost when it first replayed a rebuilt step: its archive is removed")
    assert not archive.exists()
    after = [(counted / str(pid)).read_bytes() for pid in set(replays(counted)) - before]
    assert sum(text.count(b"r") for text in after) == 1  # and the next one captures
    third = starts.run("graph_save")
    assert len(named(third, "graph_capture")) == steps


def test_nothing_is_kept_where_nothing_is_to_be(
    starts: Starts, counted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, worker={"drivers": str(counted)})
    assert reasons(starts.run("graph_capture", mode="off")) == ""
    starts.run("graph_save", create=False)
    assert not (starts.store / "graphs").exists()
