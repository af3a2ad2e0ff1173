"""A body to generations: every field, its defaults and its limits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.gateway.api import ModelCard
from coldframe.runtime.gateway.openai.prepare import prepare_chat, prepare_completion
from coldframe.runtime.gateway.openai.requests import MAX_CHOICES, MAX_SEQUENCES

LOWEST, HIGHEST = -(1 << 63), (1 << 64) - 1


def test_a_bare_completion(completion: Any) -> None:
    ready = completion()
    (generation,) = ready.generations
    assert (generation.prompt, generation.add_special) == ("Hi", True)
    assert generation.params == SamplingParams(temperature=1.0, max_tokens=16)
    assert (ready.kind, ready.n, ready.stream) == ("completion", 1, False)
    assert (ready.include_usage, ready.logprobs) == (False, False)


def test_a_bare_chat(chat: Any) -> None:
    ready = chat()
    (generation,) = ready.generations
    assert (generation.prompt, generation.add_special) == ("<s><user>Hi<assistant>", False)
    assert generation.params == SamplingParams(temperature=1.0, max_tokens=None)
    assert (ready.kind, ready.n, ready.stream, ready.logprobs) == ("chat", 1, False, False)


FIELDS = [
    ("temperature", 0, {"temperature": 0}),
    ("temperature", 2, {"temperature": 2}),
    ("top_p", 0.5, {"top_p": 0.5}),
    ("top_k", 40, {"top_k": 40}),
    ("top_k", -1, {"top_k": 0}),
    ("min_p", 0.1, {"min_p": 0.1}),
    ("repetition_penalty", 1.1, {"repetition_penalty": 1.1}),
    ("frequency_penalty", -2, {"frequency_penalty": -2}),
    ("presence_penalty", 2.0, {"presence_penalty": 2}),
    ("logit_bias", {"7": -100, "999": 5.5}, {"logit_bias": {7: -100, 999: 5.5}}),
    ("seed", LOWEST, {"seed": LOWEST}),
    ("max_tokens", 5, {"max_tokens": 5}),
    ("max_completion_tokens", 6, {"max_tokens": 6}),
    ("stop", "\n", {"stop": ("\n",)}),
    ("stop", ["a", "b"], {"stop": ("a", "b")}),
    ("stop", [], {"stop": ()}),
    ("stop_token_ids", [0, 999], {"stop_token_ids": (0, 999)}),
    ("ignore_eos", True, {"ignore_eos": True}),
    ("ignore_eos", False, {}),
]


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize(("name", "value", "expected"), FIELDS)
def test_sampling_fields(
    kind: str, name: str, value: Any, expected: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    ready = request.getfixturevalue(kind)
    params = ready(**{name: value}).generations[0].params
    assert params == dataclasses.replace(ready().generations[0].params, **expected)


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize(
    "fields",
    [
        {name: None for name, _, _ in FIELDS},
        {"n": None, "stream": None, "stream_options": None, "logprobs": None, "model": None},
        {"user": "me", "metadata": {"a": "b"}, "store": True},
        {"service_tier": "auto", "reasoning_effort": "low", "nobody": [{"knows": 1}]},
        {"tools": None, "tools_": 1, "response_format": {"type": "text"}, "tool_choice": "none"},
        {"best_of": 1, "top_logprobs": None},
    ],
)
def test_what_changes_nothing(
    kind: str, fields: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    ready = request.getfixturevalue(kind)
    assert ready(**fields) == ready()


def test_the_newer_name_of_max_tokens_wins(chat: Any) -> None:
    ready = chat(max_tokens=5, max_completion_tokens=6)
    assert ready.generations[0].params.max_tokens == 6


def test_the_request_goes_before_the_checkpoint_and_that_before_openai(card: ModelCard) -> None:
    own = {"temperature": 0.6, "top_k": 20, "top_p": None, "max_length": 20}
    mine = dataclasses.replace(card, defaults=own)
    (generation,) = prepare_completion({"prompt": "x", "top_k": 7}, mine).generations
    params = generation.params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 7, 1.0)


def test_a_checkpoint_with_wrong_defaults_is_no_fault_of_the_client(
    card: ModelCard, completion: Any, refusal: Any
) -> None:
    mine = dataclasses.replace(card, defaults={"top_p": "high"})
    body = {"prompt": "x"}
    error = refusal(lambda **fields: prepare_completion({**body, **fields}, mine))
    assert (error.status, error.param, error.code) == (500, "top_p", "model_error")
    assert "generation_config" in error.message
    assert prepare_completion({**body, "top_p": 1}, mine) == completion(prompt="x")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", ("one",)),
        ("", ("",)),
        (["one", "two"], ("one", "two")),
        ([1, 2, 999], ((1, 2, 999),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_the_four_forms_of_a_prompt(completion: Any, prompt: Any, expected: Any) -> None:
    ready = completion(prompt=prompt)
    assert tuple(generation.prompt for generation in ready.generations) == expected


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (5, "prompt"),
        (True, "prompt"),
        ({}, "prompt"),
        ([], "prompt"),
        ([[]], "prompt[0]"),
        ([None], "prompt[0]"),
        ([1.0], "prompt[0]"),
        ([True], "prompt[0]"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([[1], ["a"]], "prompt[1][0]"),
        ([[1], "a"], "prompt[1]"),
        ([1, True], "prompt[1]"),
        ([1, -1], "prompt[1]"),
        ([1000], "prompt[0]"),
        ("half \ud83d", "prompt"),
        (["whole", "half \ud83d"], "prompt[1]"),
        (["a"] * (MAX_SEQUENCES + 1), "prompt"),
    ],
)
def test_what_is_no_prompt(completion: Any, refusal: Any, prompt: Any, param: str) -> None:
    error = refusal(completion, prompt=prompt)
    assert (error.status, error.param) == (400, param)


def test_choices_come_prompt_by_prompt_and_differ_in_the_seed(completion: Any) -> None:
    ready = completion(prompt=["a", "b"], n=2, seed=5)
    made = [(generation.prompt, generation.params.seed) for generation in ready.generations]
    assert made == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]
    assert ready.n == 2


def test_seeds_wrap_within_what_the_sampler_takes(completion: Any) -> None:
    seeds = [each.params.seed for each in completion(n=3, seed=HIGHEST).generations]
    assert seeds == [HIGHEST, LOWEST, LOWEST + 1]


def test_without_a_seed_none_is_made_up_here(completion: Any) -> None:
    assert [each.params.seed for each in completion(n=2).generations] == [None, None]


def test_as_many_sequences_as_there_may_be(completion: Any, refusal: Any) -> None:
    most = MAX_SEQUENCES // MAX_CHOICES
    ready = completion(prompt=["a"] * most, n=MAX_CHOICES)
    assert len(ready.generations) == MAX_SEQUENCES
    error = refusal(completion, prompt=["a"] * (most + 1), n=MAX_CHOICES)
    assert (error.param, error.code) == ("n", "invalid_value")


def test_log_probabilities_are_asked_for_in_two_ways(
    completion: Any, chat: Any, refusal: Any
) -> None:
    for ready, expected in [
        (completion(logprobs=0), 0),
        (completion(logprobs=20), 20),
        (chat(logprobs=True), 0),
        (chat(logprobs=True, top_logprobs=20), 20),
    ]:
        assert ready.logprobs
        assert ready.generations[0].params.logprobs == expected
    assert not chat(logprobs=False, top_logprobs=0).logprobs
    assert refusal(chat, top_logprobs=1).param == "top_logprobs"
    assert refusal(chat, logprobs=1).param == "logprobs"
    assert refusal(completion, logprobs=True).param == "logprobs"
    assert refusal(completion, logprobs=21).code == "unsupported"
    assert refusal(chat, logprobs=True, top_logprobs=21).code == "unsupported"


def test_a_stream_and_its_options(chat: Any, refusal: Any) -> None:
    assert chat(stream=True).stream
    assert not chat(stream=True, stream_options={}).include_usage
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    for fields in ({}, {"stream": False}):
        error = refusal(chat, stream_options={"include_usage": True}, **fields)
        assert (error.param, error.code) == ("stream_options", "unsupported")
    error = refusal(chat, stream=True, stream_options={"include_usage": 1})
    assert error.param == "stream_options.include_usage"


def test_what_can_be_known_not_to_fit_is_refused_at_once(
    card: ModelCard, completion: Any, chat: Any, refusal: Any
) -> None:
    room = card.context_length
    assert completion(max_tokens=room - 1)
    assert completion(prompt=[1] * (room - 16))
    for ready, fields, param in [
        (completion, {"max_tokens": room}, "max_tokens"),
        (chat, {"max_completion_tokens": room}, "max_completion_tokens"),
        (completion, {"prompt": [1] * (room - 15)}, "max_tokens"),
        (completion, {"prompt": [1] * room}, "prompt"),
        (completion, {"prompt": [[1], [1] * 1_000_000]}, "prompt[1]"),
    ]:
        error = refusal(ready, **fields)
        assert (error.status, error.param) == (400, param)
        assert error.code == "context_length_exceeded"


HUGE = 10**5000
"""More digits than Python turns into text."""


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("model", [1, "", "m" * 513, "\ud800"]),
        ("max_tokens", [0, -1, 1.5, "16", True, HUGE]),
        ("max_completion_tokens", [0, "16", HUGE]),
        ("temperature", [-0.1, 2.1, "1", True, math.nan, math.inf, HUGE, [1]]),
        ("top_p", [-0.1, 1.1, "1", math.nan]),
        ("top_k", [-2, 1.5, HUGE]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, 101, -HUGE]),
        ("n", [0, 17, 1.0, "2", True, HUGE, 2**64]),
        ("seed", [LOWEST - 1, HIGHEST + 1, 1.0, "1", HUGE]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("stream", [1, "true", {}]),
        ("stop", [1, {}, "", [""], ["a" * 1025], ["\ud800"], [1], [[]], ["a"] * 65]),
        ("stop_token_ids", [1, "1", [1000], [-1], ["1"], [True], [HUGE], [1] * 129]),
        ("ignore_eos", [1, "yes"]),
        ("user", [1, {}]),
        ("metadata", [1, []]),
        ("store", ["yes"]),
        (
            "logit_bias",
            [
                [],
                "7",
                {"7": "1"},
                {"7": True},
                {"7": 101},
                {"7": math.nan},
                {"7": HUGE},
                {"1000": 1},
                {"-1": 1},
                {"a": 1},
                {" 7": 1},
                {"\u0667": 1},
                {"\ud800": 1},
                {"9" * 5000: 1},
                {str(token): 0 for token in range(1025)},
            ],
        ),
    ],
)
def test_values_out_of_range_and_of_other_types(
    kind: str, name: str, values: list[Any], request: pytest.FixtureRequest, refusal: Any
) -> None:
    ready = request.getfixturevalue(kind)
    for value in values:
        error = refusal(ready, **{name: value})
        assert (error.status, error.kind) == (400, "invalid_request_error")
        # The field, or something in it.
        assert error.param is not None
        assert error.param.partition("[")[0].partition(".")[0] == name
        assert error.code in ("invalid_value", "invalid_type", "context_length_exceeded")
        assert len(error.message) < 400
        error.message.encode()
        error.param.encode()


def test_paths_lead_to_the_mistake(completion: Any, refusal: Any) -> None:
    assert refusal(completion, stop_token_ids=[1, "a"]).param == "stop_token_ids[1]"
    assert refusal(completion, stop=["a", 5]).param == "stop[1]"
    assert refusal(completion, logit_bias={"7": 101}).param == "logit_bias.7"


def test_a_mistake_is_shown(completion: Any, refusal: Any) -> None:
    error = refusal(completion, temperature="warm" * 100)
    assert error.message.startswith("Invalid value for 'temperature': expected a number, but got")
    assert '"warmwarm' in error.message
    assert "..." in error.message


@pytest.mark.parametrize("body", [None, 1, "text", [], [{"prompt": "x"}], True])
def test_what_is_no_object(card: ModelCard, refusal: Any, body: Any) -> None:
    for ready in (
        lambda: prepare_completion(body, card),
        lambda: prepare_chat(body, card, lambda _, variables: ""),
    ):
        error = refusal(ready)
        assert (error.status, error.code) == (400, "invalid_type")


def test_what_is_missing(card: ModelCard, refusal: Any) -> None:
    error = refusal(lambda: prepare_completion({}, card))
    assert (error.param, error.code) == ("prompt", "missing_required_parameter")
    error = refusal(lambda: prepare_chat({}, card, lambda _, variables: ""))
    assert (error.param, error.code) == ("messages", "missing_required_parameter")


def test_bodies_that_are_mostly_mistakes(completion: Any, chat: Any, refusal: Any) -> None:
    million = 1_000_000
    for ready, fields in [
        (completion, {"stop": ["a"] * million}),
        (completion, {"prompt": ["a"] * million}),
        (completion, {"prompt": ["a", *[1] * million]}),
        (completion, {"stop_token_ids": [""] * million}),
        (completion, {"logit_bias": dict.fromkeys(map(str, range(million)), "x")}),
        (chat, {"messages": [1] * million}),
        (chat, {"messages": [{"role": "user", "content": [1] * million}]}),
        (chat, {"chat_template_kwargs": dict.fromkeys(map(str, range(million)))}),
    ]:
        error = refusal(ready, **fields)
        assert error.status == 400
        assert len(error.message) < 400
