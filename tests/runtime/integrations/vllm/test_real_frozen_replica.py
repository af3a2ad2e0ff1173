"""Replicas whose vLLM engine is a clone: what they answer, and what becomes of one that is lost."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.integrations.vllm.frozen_image import EngineImage
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions
from coldframe.snapshot.criu import Criu
from tests.runtime.helpers import Client, ask, finish, wait_for
from tests.runtime.integrations.vllm.bridges import (
    PROMPTS,
    START_S,
    Wish,
    answers_natively,
    nothing_held,
    options,
    pid_of,
    spans,
    vllm_is_up,
    workers_of,
)
from tests.runtime.serving import greedy, ids_of, served
from tests.runtime.snapshots import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

Make = Callable[..., Path]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(demo_model: Make) -> Path:
    return demo_model()


@pytest.fixture(scope="module")
def images(criu: Criu, model: Path, tmp_path_factory: pytest.TempPathFactory) -> SnapshotOptions:
    """A store with an image of the engine, and of no worker of ours."""
    snapshot = SnapshotOptions("auto", str(tmp_path_factory.mktemp("images") / "store"))
    engine = EngineImage(str(model), VllmOptions(kv_bytes=64 << 20), 1)
    engine.create(snapshot, compress="none")
    return snapshot


@pytest.fixture(scope="module")
def native_answers(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Wish, Client]]:
    return answers_natively(model, tmp_path_factory.mktemp("r"))


@pytest.fixture(scope="module")
def native(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What native workers say to each of the prompts, greedily."""
    runs = tmp_path_factory.mktemp("n")
    with Replica(ReplicaOptions(model=str(model), run_dir=str(runs), threads=1)) as replica:
        clients = [ask(replica, prompt, 60) for prompt in PROMPTS]
        finish(replica, *clients)
    return [client.tokens for client in clients]


def engine_of(replica: Replica) -> dict[str, str | None]:
    """What the replica says of the engine that has come up last."""
    found: dict[str, str | None] = replica.facts["snapshot"]["engine"]
    return found


def test_a_clone_takes_decode_over_and_answers_as_the_native_workers_do(
    model: Path,
    images: SnapshotOptions,
    native: list[list[int]],
    native_answers: list[tuple[Wish, Client]],
    no_leaks: Path,
) -> None:
    with Replica(options(model, no_leaks, snapshot=images)) as replica:
        first = ask(replica, PROMPTS[0], 24)
        finish(replica, first)
        assert first.tokens == native[0][:24]
        vllm_is_up(replica)
        found = engine_of(replica)
        assert (found["tier"], found["why"]) == ("image", None)
        assert replica.facts["snapshot"]["tier"] == "fresh"  # those of ours have no image
        told = spans(replica)
        assert {"snapshot_read", "snapshot_restore", "hooks", "vllm_weights", "takeover"} <= {*told}
        assert not {"vllm_config", "vllm_failed"} & {*told}
        taken = [ask(replica, prompt, 32) for prompt in PROMPTS]
        wait_for(replica, lambda: workers_of(replica, *taken) == {"vllm"})
        finish(replica, *taken)
        assert [client.tokens for client in taken] == [tokens[:32] for tokens in native]
        assert spans(replica).count("kv_load") >= len(PROMPTS)
        for wish, ours in native_answers:
            theirs = ask(replica, PROMPTS[2], 24, **wish)
            finish(replica, theirs)
            assert (theirs.tokens, theirs.text) == (ours.tokens, ours.text), wish
        nothing_held(replica)
        _answers_in_a_form(replica)
        _is_replaced_by_another_clone(replica, native)


def _answers_in_a_form(replica: Replica) -> None:
    """What compiles a grammar, and the tokenizer that it asks, are from before the freeze."""
    form = Structure("json", json.dumps(SCHEMA))
    for seed in (1, 2):
        client = ask(replica, PROMPTS[1], 40, structured=form, temperature=1.3, seed=seed)
        finish(replica, client)
        found, _ = json.JSONDecoder().raw_decode(client.text)
        assert found["name"] in ("ada", "bob")
        assert isinstance(found["old"], bool)


def _is_replaced_by_another_clone(replica: Replica, native: list[list[int]]) -> None:
    clients = [ask(replica, prompt, 60) for prompt in PROMPTS[:3]]
    wait_for(replica, lambda: all(len(client.events) > 2 for client in clients))
    os.kill(pid_of(replica, "vllm"), signal.SIGKILL)
    finish(replica, *clients)
    assert [client.tokens for client in clients] == native[:3]
    wait_for(replica, lambda: "vllm_failed" in spans(replica))
    wait_for(replica, lambda: replica.bridge.counts["clone"] == 2, START_S)
    again = ask(replica, PROMPTS[0], 24)
    finish(replica, again)
    assert again.tokens == native[0][:24]
    nothing_held(replica)


def test_a_clone_that_dies_before_it_is_up_costs_a_fresh_start_and_nothing_else(
    model: Path, images: SnapshotOptions, native: list[list[int]], no_leaks: Path
) -> None:
    with Replica(options(model, no_leaks, snapshot=images)) as replica:
        first = ask(replica, PROMPTS[0], 8)
        finish(replica, first)

        def restored() -> bool:
            return any(pid for name, pid in replica.pids.items() if name.startswith("vllm"))

        wait_for(replica, restored, START_S)
        assert replica.staff["vllm"]["up"] == 0
        os.kill(pid_of(replica, "vllm"), signal.SIGKILL)
        meanwhile = ask(replica, PROMPTS[1], 60)
        finish(replica, meanwhile)
        assert meanwhile.tokens == native[1][:60]
        vllm_is_up(replica)
        found = engine_of(replica)
        assert found["tier"] == "fresh"
        assert found["why"] is not None
        spans(replica)
        restores = [span.note or "" for span in replica.spans if span.name == "snapshot_restore"]
        assert any(note.startswith("vllm") and "failed" in note for note in restores)
        after = ask(replica, PROMPTS[2], 24)
        finish(replica, after)
        assert after.tokens == native[2][:24]
        assert replica.error is None
        nothing_held(replica)


def test_one_decodes_alone_in_an_interpreter_of_its_own(
    model: Path, images: SnapshotOptions, native: list[list[int]], no_leaks: Path
) -> None:
    asked = options(model, no_leaks, alone=True, snapshot=images)
    assert asked.vllm is not None
    # Another name of this one: what has been started by it is asked about packages and versions.
    python = str(Path(sys.executable).with_name("python3"))
    assert python != sys.executable
    with Replica(replace(asked, vllm=replace(asked.vllm, python=python))) as replica:
        clients = [ask(replica, prompt, 24) for prompt in PROMPTS]
        finish(replica, *clients, seconds=START_S)
        assert [client.tokens for client in clients] == [tokens[:24] for tokens in native]
        assert engine_of(replica)["tier"] == "image"
        assert spans(replica).count("kv_load") == len(clients)
        nothing_held(replica)


def test_a_server_tells_that_its_engine_is_a_clone(model: Path, images: SnapshotOptions) -> None:
    kv = ("--vllm-kv", "64MiB", "--kv-memory", "64MiB", "--threads", "1")
    flags = ("--snapshot", images.store, "--no-snapshot-create", "--decode", "native,vllm")
    with served(model, *flags, *kv) as server:
        server.ready()

        def decode() -> dict[str, str | None]:
            found: dict[str, str | None] = server.get("/startup").json()["decode"]
            return found

        eventually(lambda: decode()["engine"] == "vllm", seconds=START_S)
        assert decode() == {"engine": "vllm", "why": None, "tier": "image", "no_clone": None}
        timeline = server.get("/startup").json()["timeline"]
        found = {stage["name"] for stage in timeline["stages"]}
        assert {"snapshot_read", "snapshot_restore", "hooks", "takeover"} <= found
        assert server.metrics()["coldframe_vllm_events_total{clone}"] == 1
        text = "Once upon a time"
        answer = server.complete(prompt=text, max_tokens=16, ignore_eos=True)
        assert answer == greedy(model, ids_of(model, text), 16)
