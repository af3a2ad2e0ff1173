"""Replicas whose decode workers replay captured steps, on an emulated GPU; see `emulated`."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.timeline import Span
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.emulated import emulate, replays
from tests.runtime.helpers import Client, ask, expected, finish, prompt_of, wait_for

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


def captures(replica: Replica) -> list[Span]:
    return [span for span in replica.spans if span.name == "graph_capture"]


def told(replica: Replica) -> list[Span]:
    """The spans that end with somebody's first token."""
    return [span for span in replica.spans if span.name == "prefill[head]"]


def replayed(graphs: Path) -> int:
    return sum(replays(graphs).values())


def check(model: Path, *asked: tuple[list[int], int, Client]) -> None:
    for prompt, count, client in asked:
        assert client.error is None
        assert client.tokens == expected(model, tuple(prompt), count)


def test_replayed_steps_make_the_same_tokens(
    demo_model: Make, no_leaks: Path, graphs: Path
) -> None:
    model = demo_model("llama")
    prompts = [prompt_of(length, seed=length) for length in (1, 30, 64)]
    with Replica(options(model, no_leaks)) as replica:
        clients = [ask(replica, prompt, 16) for prompt in prompts]
        finish(replica, *clients)
        wait_for(replica, lambda: bool(captures(replica) and told(replica)))
        found, first = captures(replica), min(span.end_ns for span in told(replica))
    for prompt, client in zip(prompts, clients, strict=True):
        check(model, (prompt, 16, client))
    assert replayed(graphs) > 3
    assert all("failed" not in (span.note or "") for span in found)
    assert all(span.start_ns > first for span in found)


@pytest.mark.heavy
def test_where_it_is_not_wanted_nothing_is_captured(
    demo_model: Make, no_leaks: Path, graphs: Path
) -> None:
    model, prompt = demo_model("llama"), prompt_of(20)
    with Replica(options(model, no_leaks, graphs=False)) as replica:
        client = ask(replica, prompt, 16)
        finish(replica, client)
        assert captures(replica) == []
    check(model, (prompt, 16, client))
    assert replayed(graphs) == 0


@pytest.mark.heavy
def test_while_nobody_asks_all_steps_are_captured_one_by_one(
    demo_model: Make, no_leaks: Path, graphs: Path
) -> None:
    model, prompt = demo_model("qwen3"), prompt_of(20)
    with Replica(options(model, no_leaks)) as replica:
        finish(replica, one := ask(replica, prompt, 2))

        def settled() -> bool:
            # A second without another one.
            before = len(captures(replica))
            end = time.monotonic() + 4
            while time.monotonic() < end:
                replica.poll(0.05)
            return before == len(captures(replica)) > 5

        wait_for(replica, settled)
        before = replayed(graphs)
        finish(replica, two := ask(replica, prompt, 16))
        assert replayed(graphs) - before >= 13  # one or two are tried first
        notes = [span.note or "" for span in captures(replica)]
    check(model, (prompt, 2, one), (prompt, 16, two))
    assert all("while idle" in note or "in use" in note for note in notes)
    assert notes[0].startswith("1 x 8 blocks")


@pytest.mark.heavy
def test_steps_stay_captured_while_the_replica_rests(
    demo_model: Make, no_leaks: Path, graphs: Path
) -> None:
    model, prompt = demo_model("llama", "float32"), prompt_of(40)
    with Replica(options(model, no_leaks, kv_bytes=64 << 20)) as replica:
        finish(replica, first := ask(replica, prompt, 12))
        pids = replica.pids
        for _ in range(3):
            wait_for(replica, lambda: replica.idle)
            replica.park()
            wait_for(replica, lambda: replica.resting.left)
            before = replayed(graphs)
            finish(replica, again := ask(replica, prompt, 12))
            check(model, (prompt, 12, first), (prompt, 12, again))
            assert replayed(graphs) - before >= 10
        assert replica.pids == pids
        buckets = [(span.note or "").partition(",")[0] for span in captures(replica)]
    assert len(buckets) == len(set(buckets))  # none of them twice


@pytest.mark.heavy
def test_a_worker_that_dies_leaves_its_requests_to_one_that_captures_anew(
    demo_model: Make, no_leaks: Path, graphs: Path
) -> None:
    model = demo_model("llama")
    prompts = [prompt_of(length, seed=length) for length in (5, 40, 100)]
    with Replica(options(model, no_leaks)) as replica:
        clients = [ask(replica, prompt, 60) for prompt in prompts]
        wait_for(replica, lambda: replayed(graphs) > 5)
        (pid,) = [pid for name, pid in replica.pids.items() if name.startswith("decode")]
        os.kill(pid, signal.SIGKILL)
        finish(replica, *clients)
    for prompt, client in zip(prompts, clients, strict=True):
        check(model, (prompt, 60, client))
    assert len(replays(graphs)) == 2


@pytest.mark.heavy
def test_a_gpu_that_is_lost_in_a_capture_costs_a_worker(
    demo_model: Make, no_leaks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, flag = tmp_path / "graphs", tmp_path / "lost"
    place.mkdir()
    emulate(monkeypatch, worker={"graphs": str(place), "lose_at_capture": str(flag)})
    model, prompt = demo_model("llama"), prompt_of(20)
    with Replica(options(model, no_leaks)) as replica:
        before = set(replica.pids)
        finish(replica, client := ask(replica, prompt, 30))
        assert set(replica.pids) != before
    check(model, (prompt, 30, client))
    assert flag.exists()
    assert len(replays(place)) == 1


@pytest.mark.heavy
def test_a_replay_that_loses_its_worker_is_the_only_one(
    demo_model: Make, no_leaks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "graphs"
    place.mkdir()
    emulate(monkeypatch, worker={"graphs": str(place), "lose_at_replay": True})
    model, prompt = demo_model("llama"), prompt_of(20)
    with Replica(options(model, no_leaks)) as replica:
        before = set(replica.pids)
        for _ in range(3):
            finish(replica, client := ask(replica, prompt, 30))
            check(model, (prompt, 30, client))
        assert len(set(replica.pids) - before) == 1
        (note,) = [
            span.note or "" for span in replica.recorder.drain() if span.name == "graph_trial"
        ]
    assert "first replayed a captured step: steps are computed kernel by kernel" in note
    assert replayed(place) == 1


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_whoever_comes_and_goes(
    demo_model: Make, no_leaks: Path, graphs: Path, family: str
) -> None:
    """Prompts that begin alike, long and short ones, some by lot, some taken back, and a death."""
    model, chance = demo_model(family), random.Random(7)
    trunk, asked, gone = prompt_of(300, seed=1), list[tuple[list[int], int, Client]](), []
    seeded = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.8, top_k=20, seed=5)
    lots: list[Client] = []
    with Replica(options(model, no_leaks, local_prefill=800)) as replica:
        for round_ in range(20):
            prompt = trunk[: chance.choice((0, 40, 200))] + prompt_of(chance.randint(1, 60), round_)
            count = chance.randint(1, 30)
            client = ask(replica, prompt, count)
            if chance.random() < 0.2:
                replica.poll(0.05)
                replica.cancel(client.request)
                gone.append(client)
            else:
                asked.append((prompt, count, client))
            if round_ % 6 == 0:
                lots.append(Client())
                replica.submit(seeded, lots[-1], prompt_ids=tuple(trunk[:50]))
            if round_ == 9:
                (pid, *_) = [p for name, p in replica.pids.items() if name.startswith("decode")]
                os.kill(pid, signal.SIGKILL)
            replica.poll(chance.uniform(0, 0.1))
        finish(replica, *(client for *_, client in asked), *lots)
    check(model, *asked)
    assert len({tuple(client.tokens) for client in lots}) == 1  # the same lot, whoever was beside
    assert gone
    assert replayed(graphs) > 3
