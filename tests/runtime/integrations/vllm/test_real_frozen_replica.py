"""Replicas whose vLLM engine is a clone: what they answer, and what becomes of one that is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.integrations.vllm.frozen_image import EngineImage
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.replica import Replica
from coldframe.runtime.vllm_spec import VllmOptions
from coldframe.snapshot.criu import Criu
from tests.runtime.helpers import Client, ask, expected, finish, wait_for
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


def engine_of(replica: Replica) -> dict[str, str | None]:
    """What the replica says of the engine that has come up last."""
    found: dict[str, str | None] = replica.facts["snapshot"]["engine"]
    return found


def test_a_clone_takes_decode_over_and_answers_as_the_native_workers_do(
    model: Path,
    images: SnapshotOptions,
    native_answers: list[tuple[Wish, Client]],
    no_leaks: Path,
) -> None:
    with Replica(options(model, no_leaks, snapshot=images)) as replica:
        first = ask(replica, PROMPTS[0], 24)
        finish(replica, first)
        assert first.tokens == expected(model, tuple(PROMPTS[0]), 24)
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
        for prompt, client in zip(PROMPTS, taken, strict=True):
            assert client.tokens == expected(model, tuple(prompt), 32)
        assert spans(replica).count("kv_load") >= len(PROMPTS)
        for wish, ours in native_answers:
            theirs = ask(replica, PROMPTS[2], 24, **wish)
            finish(replica, theirs)
            assert (theirs.tokens, theirs.text) == (ours.tokens, ours.text), wish
        nothing_held(replica)
        _answers_in_a_form(replica)
        _is_replaced_by_another_clone(replica, model)


def _answers_in_a_form(replica: Replica) -> None:
    """What compiles a grammar, and the tokenizer that it asks, are from before the freeze."""
    form = Structure("json", json.dumps(SCHEMA))
    for seed in (1, 2):
        client = ask(replica, PROMPTS[1], 40, structured=form, temperature=1.3, seed=seed)
        finish(replica, client)
        found, _ = json.JSONDecoder().raw_decode(client.text)
        assert found["name"] in ("ada", "bob")
        assert isinstance(found["old"], bool)


def _is_replaced_by_another_clone(replica: Replica, model: Path) -> None:
    clients = [ask(replica, prompt, 60) for prompt in PROMPTS[:3]]
    wait_for(replica, lambda: all(len(client.events) > 2 for client in clients))
    os.kill(pid_of(replica, "vllm"), signal.SIGKILL)
    finish(replica, *clients)
    for prompt, client in zip(PROMPTS[:3], clients, strict=True):
        assert client.tokens == expected(model, tuple(prompt), 60)
    assert "vllm_failed" in spans(replica)
    wait_for(replica, lambda: replica.bridge.counts["clone"] == 2, START_S)
    again = ask(replica, PROMPTS[0], 24)
    finish(replica, again)
    assert again.tokens == expected(model, tuple(PROMPTS[0]), 24)
    nothing_held(replica)


def test_a_clone_that_dies_before_it_is_up_costs_a_fresh_start_and_nothing_else(
    model: Path, images: SnapshotOptions, no_leaks: Path
) -> None:
    with Replica(options(model, no_leaks, snapshot=images)) as replica:
        first = ask(replica, PROMPTS[0], 8)
        finish(replica, first)
        restored = lambda: any(  # noqa: E731
            pid for name, pid in replica.pids.items() if name.startswith("vllm")
        )
        wait_for(replica, restored, START_S)
        assert replica.staff["vllm"]["up"] == 0
        os.kill(pid_of(replica, "vllm"), signal.SIGKILL)
        meanwhile = ask(replica, PROMPTS[1], 60)
        finish(replica, meanwhile)
        assert meanwhile.tokens == expected(model, tuple(PROMPTS[1]), 60)
        vllm_is_up(replica)
        found = engine_of(replica)
        assert found["tier"] == "fresh"
        assert found["why"] is not None
        spans(replica)
        (note,) = {
            span.note
            for span in replica.spans
            if span.name == "snapshot_restore"
            and "failed" in (span.note or "")
            and span.note
            and span.note.startswith("vllm")
        }
        assert note is not None
        after = ask(replica, PROMPTS[2], 24)
        finish(replica, after)
        assert after.tokens == expected(model, tuple(PROMPTS[2]), 24)
        assert replica.error is None
        nothing_held(replica)


def test_one_decodes_alone(model: Path, images: SnapshotOptions, no_leaks: Path) -> None:
    with Replica(options(model, no_leaks, alone=True, snapshot=images)) as replica:
        clients = [ask(replica, prompt, 24) for prompt in PROMPTS]
        finish(replica, *clients, seconds=START_S)
        for prompt, client in zip(PROMPTS, clients, strict=True):
            assert client.tokens == expected(model, tuple(prompt), 24)
        assert engine_of(replica)["tier"] == "image"
        assert spans(replica).count("kv_load") == len(clients)
        nothing_held(replica)
