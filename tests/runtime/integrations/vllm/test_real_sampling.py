"""Sampling in vLLM and in the native engine: the same tokens, wherever the answer is cut."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.integrations.vllm.environment import SAMPLER_ENVIRONMENT
from coldframe.runtime.integrations.vllm.params import ENGINE, ask, refusing, sampled
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.worker.handoff import Job
from coldframe.runtime.worker.text import Tokenizer
from tests.runtime.helpers import Client, finish, prompt_of
from tests.runtime.integrations.vllm.hosts import Host, host

pytestmark = pytest.mark.vllm

COUNT = 20
EOS = (1, 3)
"""The demo model's."""
PROMPT = tuple(prompt_of(40))
ASKED: Mapping[str, dict[str, Any]] = {
    "greedy": {"logprobs": 3},
    "seeded": {"temperature": 1.0, "seed": 11, "logprobs": 3},
    "narrow": {"temperature": 1.4, "top_k": 50, "top_p": 0.8, "min_p": 0.01, "seed": -(2**63)},
    "penalties": {"repetition_penalty": 1.4, "frequency_penalty": 0.9, "presence_penalty": 0.4},
    "everything": {
        "temperature": 0.9,
        "top_p": 0.95,
        "seed": 2**64 - 1,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.2,
        "logit_bias": {7: 3.0, 19: -100.0},
        "logprobs": 2,
    },
}


def params_of(name: str) -> SamplingParams:
    return SamplingParams(max_tokens=COUNT, ignore_eos=True, **ASKED[name])


@pytest.fixture(scope="module")
def native(
    demo_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """The native engine's answers: a token, its log-probability and the likeliest ones, each."""
    runs = tmp_path_factory.mktemp("r")
    with Replica(ReplicaOptions(model=str(demo_model()), run_dir=str(runs))) as replica:
        clients = {}
        for name in ASKED:
            clients[name] = client = Client()
            replica.submit(params_of(name), client, prompt_ids=PROMPT)
        finish(replica, *clients.values())
    return {
        name: [(event.token, event.logprob, event.top) for event in client.events]
        for name, client in clients.items()
    }


@pytest.fixture(scope="module")
def engine(demo_model: Callable[..., Path]) -> Iterator[Host]:
    with host(demo_model(), environment=SAMPLER_ENVIRONMENT, dtype="float32", **ENGINE) as made:
        yield made


def _answers(engine: Any, jobs: list[Job], one_by_one: bool = False) -> dict[str, list[Any]]:
    """In the engine's process: what comes of jobs that are given to it together."""
    made: dict[str, list[Any]] = {job.request: [] for job in jobs}
    asked = {job.request: ask(job, EOS) for job in jobs}
    waiting = list(jobs)
    while waiting or engine.has_unfinished_requests():
        for job in waiting[: 1 if one_by_one else None]:
            wanted = asked[job.request]
            prompt = {"prompt_token_ids": wanted.prompt_token_ids}
            engine.add_request(job.request, prompt, wanted.sampling_params())
            waiting.remove(job)
        for output in engine.step():
            (answer,) = output.outputs
            params = next(job.params for job in jobs if job.request == output.request_id)
            for place, token in enumerate(answer.token_ids):
                told = answer.logprobs[place] if answer.logprobs else None
                each = sampled(params, token, told)
                made[output.request_id].append((each.token, each.logprob, each.top))
    return {request: each[asked[request].known :] for request, each in made.items()}


def tokens(answer: list[Any]) -> list[int]:
    return [token for token, _, _ in answer]


def test_the_same_tokens_wherever_the_cut_falls(engine: Host, native: dict[str, list[Any]]) -> None:
    """Every request behind every number of its tokens, all of them in batches that come and go."""
    jobs, expected = [], {}
    for name, answer in native.items():
        for cut in range(COUNT):
            request = f"{name}-{cut}"
            known = tuple(tokens(answer[:cut]))
            jobs.append(Job(request, 0, params_of(name), None, PROMPT, known))
            expected[request] = tokens(answer[cut:])
    got = engine.call(_answers, jobs, True)
    assert {request: tokens(answer) for request, answer in got.items()} == expected


def test_log_probabilities_are_the_models_own(engine: Host, native: dict[str, list[Any]]) -> None:
    jobs = [Job(name, 0, params_of(name), None, PROMPT) for name in native]
    got = engine.call(_answers, jobs)
    for name, answer in native.items():
        for (token, logprob, top), (_, theirs, their_top) in zip(answer, got[name], strict=True):
            if logprob is None:
                assert theirs is None
                continue
            assert theirs == pytest.approx(logprob, abs=2e-4), (name, token)
            assert [t for t, _ in their_top] == [t for t, _ in top]
            assert [p for _, p in their_top] == pytest.approx([p for _, p in top], abs=2e-4)


def test_a_seeded_answer_repeats_itself_and_another_seed_gives_another(engine: Host) -> None:
    one = Job("one", 0, params_of("seeded"), None, PROMPT)
    two = replace(one, request="two")
    other = replace(one, request="other", params=replace(one.params, seed=12))
    got = engine.call(_answers, [one, two, other])
    assert tokens(got["one"]) == tokens(got["two"])
    assert tokens(got["one"]) != tokens(got["other"])


def test_greedy_and_penalties_are_plain_vllms(engine: Host, native: dict[str, list[Any]]) -> None:
    """Of an answer that nobody cuts vLLM's own penalties are the same ones."""
    wanted = dict(ASKED["penalties"])
    plain, with_penalties = (
        engine.generate([PROMPT], max_tokens=COUNT, ignore_eos=True),
        engine.generate([PROMPT], max_tokens=COUNT, ignore_eos=True, **wanted),
    )
    assert plain[0].tokens == tokens(native["greedy"])
    assert with_penalties[0].tokens == tokens(native["penalties"])
    assert plain[0].tokens != with_penalties[0].tokens


def test_who_asks_for_no_seed_is_vllms(engine: Host) -> None:
    """Two such answers differ, as drawn seeds make them; each has as many tokens as it should."""
    params = SamplingParams(temperature=1.5, max_tokens=COUNT, ignore_eos=True).with_seed()
    jobs = [Job(name, 0, params, None, PROMPT) for name in ("one", "two")]
    got = engine.call(_answers, jobs)
    assert len(got["one"]) == len(got["two"]) == COUNT
    assert tokens(got["one"]) != tokens(got["two"])


def test_a_bad_request_to_the_sampler_harms_nobody(engine: Host) -> None:
    assert "extra_args['coldframe']" in engine.call(_refused)
    assert len(engine.generate([PROMPT], max_tokens=3)[0].tokens) == 3


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
FORMS = {
    "json": Structure("json", json.dumps(SCHEMA)),
    "choice": Structure("choice", '["yes", "no"]'),
    "regex": Structure("regex", "[ab]{3}-[0-9]{2}"),
    "grammar": Structure("grammar", 'root ::= "x" ("y" | "z") "."'),
}


def test_answers_have_the_form_that_is_asked_for(
    engine: Host, demo_model: Callable[..., Path]
) -> None:
    """Also drawn at random by our sampler, and begun anew behind any of its tokens."""
    tokenizer = Tokenizer.load(demo_model())
    jobs = [
        Job(
            f"{name}-{kind}", 0, SamplingParams(max_tokens=60, structured=form, **how), None, PROMPT
        )
        for name, form in FORMS.items()
        for kind, how in (("greedy", {}), ("seeded", {"temperature": 1.5, "seed": 3}))
    ]
    got = engine.call(_answers, jobs)
    for request, answer in got.items():
        *made, end = tokens(answer)
        assert end in EOS, f"{request} did not end: {tokenizer.decode(tokens(answer))!r}"
        text = tokenizer.decode(made)
        match request.split("-")[0]:
            case "json":
                jsonschema_valid(json.loads(text))
            case "choice":
                assert text in ("yes", "no")
            case "regex":
                assert re.fullmatch("[ab]{3}-[0-9]{2}", text)
            case "grammar":
                assert text in ("xy.", "xz.")
    again, expected = [], {}
    for job in jobs:
        whole = tokens(got[job.request])
        for cut in range(1, len(whole), 3):
            request = f"{job.request}-{cut}"
            again.append(replace(job, request=request, generated_ids=tuple(whole[:cut])))
            expected[request] = whole[cut:]
    begun = engine.call(_answers, again)
    assert {request: tokens(answer) for request, answer in begun.items()} == expected


def jsonschema_valid(value: Any) -> None:
    assert set(value) == {"name", "old"}
    assert value["name"] in ("ada", "bob")
    assert isinstance(value["old"], bool)


@pytest.mark.parametrize(
    "form",
    [
        Structure("regex", "(["),
        Structure("grammar", "root ::= missing"),
        Structure("json", '{"type": "no such type"}'),
    ],
)
def test_a_form_without_sense_is_the_clients_mistake(engine: Host, form: Structure) -> None:
    params = SamplingParams(max_tokens=9, structured=form)
    told = engine.call(_what_is_wrong, Job("wrong", 0, params, None, PROMPT))
    assert "vLLM does not take this request" in told
    assert len(engine.generate([PROMPT], max_tokens=3)[0].tokens) == 3


def _what_is_wrong(engine: Any, job: Job) -> str:
    try:
        with refusing():
            asked = ask(job, EOS)
            prompt = {"prompt_token_ids": asked.prompt_token_ids}
            engine.add_request(job.request, prompt, asked.sampling_params())
    except RequestError as error:
        return str(error)
    made = []
    while engine.has_unfinished_requests():
        made += [(output.outputs[0].finish_reason, output.finished) for output in engine.step()]
    return f"it was taken: {made}"


def _refused(engine: Any) -> str:
    from vllm import SamplingParams as Theirs

    params = Theirs(max_tokens=3, extra_args={"coldframe": {"version": 99}})
    try:
        with refusing():
            engine.add_request("bad", {"prompt_token_ids": [1, 2]}, params)
    except RequestError as error:
        return str(error)
    return "it was taken"
