"""What a request says of its KV, fingerprints, and the first token: no vLLM needed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from coldframe.loader.errors import ReplicaError, RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.integrations.vllm.fingerprint import (
    Fingerprint,
    differences,
    kv_differences,
    native,
    rope_facts,
)
from coldframe.runtime.integrations.vllm.first_token import FirstToken, FirstTokens
from coldframe.runtime.integrations.vllm.transfer import (
    KEY,
    Consume,
    Outcome,
    Produce,
    consume,
    digest_of,
    handed,
    mode_of,
    parse,
    produce,
    prompt_of,
    read_handed,
)
from coldframe.runtime.worker.handoff import Handoff, Job

MINE = Fingerprint(
    *("model", "BF16", "form", 4, 2, 32, "theta=1"),
    engine="vllm",
    version="1",
    attention="A",
    block_tokens=128,
)


def handoff_of(
    prompt: int = 40, generated: tuple[int, ...] = (7,), kv_tokens: int | None = None, **params
) -> Handoff:
    job = Job(
        "r", 2, SamplingParams(**params), prompt_ids=tuple(range(prompt)), generated_ids=generated
    )
    there = prompt + len(generated) - 1 if kv_tokens is None else kv_tokens
    return Handoff(job, "model", "form", (3, 4), there, "cpu")


@pytest.mark.parametrize(
    ("mode", "generated", "prompt", "kv"),
    [
        ("fast", (7,), 41, 40),
        ("exact", (7,), 40, 39),
        ("fast", (7, 8, 9), 43, 42),
        ("exact", (7, 8, 9), 42, 41),
        ("fast", (), 40, 39),
        ("exact", (), 40, 39),
    ],
)
def test_the_last_token_is_always_computed(mode, generated, prompt, kv) -> None:
    handoff = handoff_of(generated=generated)
    ids = prompt_of(handoff, mode)
    asked = parse(json.loads(json.dumps(consume(handoff, mode))))
    assert isinstance(asked, Consume)
    assert (len(ids), asked.kv_tokens) == (prompt, kv)
    assert asked.tokens == digest_of(ids[:kv])
    assert (asked.request, asked.attempt, asked.domain) == ("r", 2, "cpu")


def test_a_part_of_the_kv_is_what_it_is() -> None:
    asked = parse(consume(handoff_of(kv_tokens=10), "fast"))
    assert isinstance(asked, Consume)
    assert asked.kv_tokens == 10


def test_checksums_are_of_all_tokens_or_none() -> None:
    for mode, expected in (("fast", ("a", "b")), ("exact", ())):
        asked = parse(consume(handoff_of(), mode, checksums=("a", "b")))
        assert isinstance(asked, Consume)
        assert asked.checksums == expected


def test_what_goes_in_comes_out() -> None:
    params = consume(handoff_of(), "fast", made_by=MINE, made_for=replace(MINE, version="2"))
    asked = parse(json.loads(json.dumps(params)))
    assert isinstance(asked, Consume)
    assert (asked.made_by, asked.made_for) == (MINE, replace(MINE, version="2"))
    job = handoff_of().job
    made = parse(json.loads(json.dumps(produce(job, opens=True, checksums=True))))
    assert made == Produce(job, opens=True, checksums=True)
    for outcome in (Outcome(handoff_of(), MINE, None, ("a",)), Outcome(None, MINE, "no room")):
        assert read_handed(json.loads(json.dumps(handed(outcome)))) == outcome


def test_others_parameters_are_not_ours() -> None:
    for params in (None, {}, {"remote_host": "a"}):
        assert parse(params) is None
        assert read_handed(params) is None
    assert read_handed(consume(handoff_of(), "fast")) is None


@pytest.mark.parametrize(
    "wrong",
    [
        7,
        {"do": "consume"},
        {"version": 99, "do": "consume"},
        {"version": 1, "do": "steal"},
        {"version": 1, "do": "consume", "request": "r"},
        {"version": 1, "do": "consume", "request": "r", "attempt": "x"},
        {"version": 1, "do": "produce", "job": 7},
    ],
)
def test_nonsense_is_refused(wrong) -> None:
    with pytest.raises(RequestError):
        parse({KEY: wrong})


def test_an_old_handoff_is_refused() -> None:
    said = handed(Outcome(handoff_of()))
    said[KEY]["handoff"]["version"] = 1
    with pytest.raises(ReplicaError):
        read_handed(said)


def test_what_differs_is_named() -> None:
    other = replace(MINE, version="2", layers=5)
    assert differences(MINE, other) == {"version": ("1", "2"), "layers": (4, 5)}
    assert kv_differences(MINE, other) == {"layers": (4, 5)}
    assert Fingerprint.from_wire({**MINE.to_wire(), "of tomorrow": 1}) == MINE


def test_rope_in_both_spellings() -> None:
    old = {"rope_theta": 5e5, "max_position_embeddings": 64}
    new = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000},
        "max_position_embeddings": 64,
    }
    assert rope_facts(old) == rope_facts(new)
    assert rope_facts(old) != rope_facts({**old, "rope_theta": 1e4})
    scaled = {**old, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope_facts(scaled) != rope_facts(old)
    assert rope_facts(scaled) == rope_facts(
        {**old, "rope_scaling": {"rope_type": "linear", "factor": 2}}
    )


def test_the_native_engine_has_one_too(demo_model) -> None:
    config = json.loads((demo_model() / "config.json").read_text())
    found = native(ModelSpec.from_config(config), "model", config)
    assert (found.layers, found.kv_dtype, found.block_tokens) == (4, "F32", 32)


@pytest.mark.parametrize(
    ("params", "mode"),
    [
        ({}, "fast"),
        ({"temperature": 0.7, "seed": 1}, "exact"),
        ({"frequency_penalty": 0.5}, "exact"),
        ({"logit_bias": {3: 1.0}}, "exact"),
        ({"structured": Structure("json_object")}, "exact"),
    ],
)
def test_the_mode_follows_the_sampling(params, mode) -> None:
    assert mode_of(SamplingParams(**params), shared_sampler=False) == mode
    ours = "exact" if "structured" in params else "fast"
    assert mode_of(SamplingParams(**params), shared_sampler=True) == ours


def test_fast_takes_all_that_comes() -> None:
    counts = FirstTokens()
    first = FirstToken(handoff_of(max_tokens=9), "fast", counts)
    assert (len(first.prompt), first.max_tokens) == (41, 8)
    assert first.take([9, 9]) == [9, 9]
    assert counts == FirstTokens(0, 0)


def test_exact_drops_what_the_client_has() -> None:
    counts = FirstTokens()
    first = FirstToken(handoff_of(max_tokens=9), "exact", counts)
    assert (len(first.prompt), first.max_tokens) == (40, 9)
    assert first.take([]) == []
    assert first.take([7, 8]) == [8]
    assert first.take([7]) == [7]  # the same token once more is an answer like any other
    assert counts == FirstTokens(1, 0)


def test_a_mismatch_begins_again_in_the_fast_way() -> None:
    counts = FirstTokens()
    first = FirstToken(handoff_of(max_tokens=9), "exact", counts)
    assert first.take([6, 8]) is None
    assert (first.mode, len(first.prompt), first.max_tokens) == ("fast", 41, 8)
    asked = parse(first.kv_transfer_params)
    assert isinstance(asked, Consume)
    assert asked.kv_tokens == 40
    assert first.take([6]) == [6]
    assert counts == FirstTokens(0, 1)


def test_without_a_token_there_is_none_to_draw_again() -> None:
    assert FirstToken(handoff_of(generated=()), "exact", FirstTokens()).mode == "fast"
