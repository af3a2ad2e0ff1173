"""What vLLM is asked for a job, and what becomes of its answer; without vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.integrations.vllm.params import ask, own_way, sampled
from coldframe.runtime.integrations.vllm.transfer import mode_of
from coldframe.runtime.worker.handoff import Job

PROMPT, EOS = (11, 12, 13), (2,)


def job(*made: int, **params: object) -> Job:
    wanted = SamplingParams(**{"max_tokens": 8, **params})  # type: ignore[arg-type]
    return Job("r", 0, wanted, prompt_ids=PROMPT, generated_ids=made)


def test_a_greedy_request_is_vllms_own() -> None:
    asked = ask(job(), EOS)
    assert asked.prompt_token_ids == [11, 12, 13]
    assert asked.known == 0
    assert asked.sampling == {
        "max_tokens": 8,
        "detokenize": False,
        "ignore_eos": True,
        "stop_token_ids": [2],
        "logprobs": None,
        "temperature": 0.0,
    }


def test_what_is_made_already_stands_behind_the_prompt() -> None:
    asked = ask(job(5, 6, temperature=0.7, seed=3), EOS)
    assert asked.prompt_token_ids == [11, 12, 13, 5, 6]
    assert asked.sampling["max_tokens"] == 6
    assert asked.sampling["temperature"] == 0.0, "to vLLM it is greedy: one token is left to it"
    told = asked.sampling["extra_args"]["coldframe"]
    assert (told["prompt_tokens"], told["known"], told["params"]["seed"]) == (3, [], 3)
    assert SamplingParams.from_wire(told["params"]).temperature == 0.7


def test_a_grammar_sees_the_answer_from_its_beginning() -> None:
    asked = ask(job(5, 6, structured=Structure("regex", "[a-z]+")), EOS)
    assert asked.prompt_token_ids == [11, 12, 13]
    assert (asked.known, asked.sampling["max_tokens"]) == (2, 8)
    assert asked.sampling["extra_args"]["coldframe"]["known"] == [5, 6]
    assert asked.sampling["structured_outputs"] == {"regex": "[a-z]+"}


@pytest.mark.parametrize(
    ("structure", "theirs"),
    [
        (Structure("json_object"), {"json_object": True}),
        (Structure("json", "{}"), {"json": {}}),
        (Structure("json", '{"type": "object"}'), {"json": {"type": "object"}}),
        (Structure("choice", '["a", "b"]'), {"choice": ["a", "b"]}),
        (Structure("grammar", 'root ::= "a"'), {"grammar": 'root ::= "a"'}),
    ],
)
def test_forms_by_vllms_names(structure: Structure, theirs: object) -> None:
    structure.validate()
    assert ask(job(structured=structure), EOS).sampling["structured_outputs"] == theirs


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, True),
        ({"temperature": 1.0, "seed": 5}, False),
        ({"temperature": 1.0, "seed": 5, "drawn": True}, True),
        ({"temperature": 1.0, "seed": 5, "drawn": True, "top_p": 0.0}, False),
        ({"temperature": 0.001, "seed": 5, "drawn": True}, False),
        ({"temperature": 2.5, "seed": 5, "drawn": True}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.5}, False),
        ({"logit_bias": {3: 5.0}}, False),
    ],
)
def test_who_samples(changes: dict[str, object], own: bool) -> None:
    params = SamplingParams(**changes)  # type: ignore[arg-type]
    assert own_way(params) is own
    assert ("extra_args" not in ask(job(**changes), EOS).sampling) is own


def test_a_drawn_seed_is_known_to_be_one() -> None:
    assert SamplingParams().with_seed().drawn
    assert not SamplingParams(seed=4).with_seed().drawn
    wire = SamplingParams(structured=Structure("json_object")).with_seed().to_wire()
    assert SamplingParams.from_wire(wire).to_wire() == wire
    assert SamplingParams.from_wire(wire).needs == "vllm"
    assert mode_of(SamplingParams.from_wire(wire), shared_sampler=True) == "exact"


def test_ends_are_the_requests_and_the_models() -> None:
    assert ask(job(stop_token_ids=(9, 2)), EOS).sampling["stop_token_ids"] == [2, 9]
    assert ask(job(stop_token_ids=(9,), ignore_eos=True), EOS).sampling["stop_token_ids"] == [9]


def test_nothing_left_to_make_is_refused() -> None:
    with pytest.raises(RequestError, match="as long as it may be"):
        ask(job(1, 2, max_tokens=2), EOS)


def test_kv_and_sampler_both_have_their_part() -> None:
    asked = ask(job(seed=1, temperature=1.0), EOS, kv_transfer_params={"coldframe": {"v": 1}})
    assert asked.sampling["extra_args"]["kv_transfer_params"] == {"coldframe": {"v": 1}}
    assert asked.sampling["extra_args"]["coldframe"]["params"]["seed"] == 1


@dataclass
class Logprob:
    logprob: float
    rank: int = 0


def test_logprobs_are_told_as_the_native_engine_tells_them() -> None:
    theirs = {7: Logprob(-3.0), 4: Logprob(-0.5), 3: Logprob(-0.5), 9: Logprob(float("-inf"))}
    params = SamplingParams(logprobs=2)
    told = sampled(params, 7, theirs)
    assert (told.logprob, told.top) == (-3.0, ((3, -0.5), (4, -0.5)))
    assert sampled(replace(params, logprobs=20), 7, theirs).top[-1] == (7, -3.0)
    assert sampled(replace(params, logprobs=0), 7, theirs).top == ()
    assert sampled(replace(params, logprobs=None), 7, None).logprob is None


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("xml", "a"),
        ("json_object", "{}"),
        ("json", ""),
        ("json", "{"),
        ("json", "[]"),
        ("choice", "[]"),
        ("choice", '["a", 1]'),
        ("regex", 5),
    ],
)
def test_what_is_no_form(kind: str, spec: object) -> None:
    with pytest.raises(RequestError):
        checked_and_asked(Structure(kind, spec))  # type: ignore[arg-type]


def checked_and_asked(structure: Structure) -> None:
    """Checks a form at once, and then as vLLM's parameters are made of it."""
    asking = job(structured=structure)
    asking.params.validate(20)
    ask(asking, EOS)
