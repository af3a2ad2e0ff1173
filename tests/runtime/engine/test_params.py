"""Sampling parameters: ranges, and the way over the wire."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.params import MAX_STOP_LENGTH, MAX_STOPS, SamplingParams

FULL = SamplingParams(
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.1,
    frequency_penalty=0.5,
    presence_penalty=-0.5,
    logit_bias={3: 1.5, 12: -100.0},
    seed=(1 << 64) - 1,
    max_tokens=7,
    stop=("\n\n", "é"),
    stop_token_ids=(1, 2),
    ignore_eos=True,
    logprobs=5,
)


def test_the_wire_keeps_everything() -> None:
    assert SamplingParams.from_wire(json.loads(json.dumps(FULL.to_wire()))) == FULL


def test_what_is_missing_on_the_wire_has_its_default() -> None:
    assert SamplingParams.from_wire({}) == SamplingParams()


def test_good_parameters_pass() -> None:
    SamplingParams().validate(1)
    FULL.validate(13)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "1"),
        ("temperature", True),
        ("temperature", None),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("top_p", 10**400),
        ("top_p", -0.01),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", [1]),
        ("seed", 1 << 64),
        ("seed", 1.0),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop", ("x" * (MAX_STOP_LENGTH + 1),)),
        ("stop", ("x",) * (MAX_STOPS + 1)),
        ("stop", (1,)),
        ("stop_token_ids", (100,)),
        ("stop_token_ids", ("1",)),
        ("ignore_eos", 1),
        ("logprobs", 21),
        ("logprobs", -1),
    ],
)
def test_bad_parameters_are_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value}).validate(100)
    assert caught.value.where is not None
    assert caught.value.where.startswith(name)
    assert caught.value.expected is not None
    assert caught.value.got is not None
    assert len(caught.value.got) <= 100


@pytest.mark.parametrize(
    ("wire", "where"),
    [
        ({"temprature": 1.0}, "temprature"),
        ({"stop": "word"}, "stop"),
        ({"logit_bias": {"cat": 1.0}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
    ],
)
def test_a_bad_wire_is_refused(wire: dict[str, Any], where: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.from_wire(wire)
    assert caught.value.where == where


def test_a_seed_is_drawn_once() -> None:
    drawn = SamplingParams(temperature=1.0).with_seed()
    assert drawn.seed is not None
    assert drawn.with_seed() == drawn
    assert SamplingParams(temperature=1.0).with_seed() != drawn
    drawn.validate(10)


def test_the_front_needs_no_torch_for_it() -> None:
    code = "import sys, coldframe.runtime.engine.params; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
