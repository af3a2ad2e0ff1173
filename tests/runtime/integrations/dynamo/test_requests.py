"""Dynamo's requests as ours: sampled as those to our gateway, and refused as they are."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.runtime.engine.structure import Structure
from coldframe.runtime.gateway.api import ApiError, ModelCard
from coldframe.runtime.gateway.openai.prepare import prepare_completion
from coldframe.runtime.integrations.dynamo.requests import generations_of

CARD = ModelCard("m", 0, 256, 1000)
TUNED = ModelCard("m", 0, 256, 1000, defaults={"temperature": 0.5, "top_k": 7, "top_p": 0.9})
WITH_VLLM = ModelCard("m", 0, 256, 1000, vllm=True)


def request(**parts: Any) -> dict[str, Any]:
    """As the preprocessor makes it: what was not said is null."""
    return {
        "model": "m",
        "token_ids": [5, 6, 7],
        "stop_conditions": {"max_tokens": 9, "stop": None, "min_tokens": None, "ignore_eos": None},
        "sampling_options": {"n": None, "temperature": None, "seed": None, "guided_decoding": None},
        "output_options": {"logprobs": None, "prompt_logprobs": None},
        "eos_token_ids": [2],
        "annotations": [],
        **parts,
    }


@pytest.mark.parametrize("card", [CARD, TUNED], ids=["plain", "tuned"])
@pytest.mark.parametrize(
    ("sampling", "stops", "output"),
    [
        ({}, {}, {}),
        ({"temperature": 0.0}, {"stop": ["a", "b"]}, {}),
        ({"temperature": 0.7, "top_p": 0.5, "top_k": 3, "min_p": 0.1}, {}, {"logprobs": 2}),
        ({"top_k": -1, "seed": 11, "repetition_penalty": 1.5}, {"stop_token_ids": [9]}, {}),
        ({"frequency_penalty": 0.5, "presence_penalty": -0.5}, {"ignore_eos": True}, {}),
        ({"logit_bias": {"5": -3.5}}, {}, {"logprobs": 0}),
        ({"n": 3, "seed": (1 << 63) - 1}, {}, {}),
        ({"n": 2}, {}, {}),
    ],
)
def test_parameters_are_those_of_the_same_request_over_http(
    card: ModelCard, sampling: Any, stops: Any, output: Any
) -> None:
    made = generations_of(
        request(
            sampling_options=sampling,
            stop_conditions={"max_tokens": 9, **stops},
            output_options=output,
        ),
        card,
    )
    body = {"prompt": [5, 6, 7], "max_tokens": 9, **sampling, **stops, **output}
    expected = prepare_completion(body, card).generations
    assert [(g.prompt, g.params) for g in made] == [(g.prompt, g.params) for g in expected]


def test_an_answer_may_be_as_long_as_the_context_leaves() -> None:
    (made,) = generations_of(request(stop_conditions={}), CARD)
    assert made.params.max_tokens is None


def test_the_models_own_ends_are_ends_unless_they_are_to_be_ignored() -> None:
    stops = {"max_tokens": 4, "stop_token_ids": [9], "stop_token_ids_hidden": [2, 9]}
    (made,) = generations_of(request(stop_conditions=stops), CARD)
    assert made.params.stop_token_ids == (9, 2)
    (made,) = generations_of(request(stop_conditions={**stops, "ignore_eos": True}), CARD)
    assert made.params.stop_token_ids == (9,)


@pytest.mark.parametrize(
    ("guided", "expected"),
    [
        ({"json": {"type": "object"}}, Structure("json", '{"type": "object"}')),
        ({"json": '{"type": "object"}'}, Structure("json", '{"type": "object"}')),
        ({"regex": "a+"}, Structure("regex", "a+")),
        ({"choice": ["a", "b"]}, Structure("choice", '["a", "b"]')),
        ({"grammar": "root ::= x"}, Structure("grammar", "root ::= x")),
        ({"json": None}, None),
    ],
)
def test_a_form_of_the_answer_is_vllms_to_see_to(guided: Any, expected: Structure | None) -> None:
    asked = request(sampling_options={"guided_decoding": guided})
    (made,) = generations_of(asked, WITH_VLLM)
    assert made.params.structured == expected
    if expected is not None:
        with pytest.raises(ApiError, match="not supported") as raised:
            generations_of(asked, CARD)
        assert raised.value.status == 400


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("token_ids", {"token_ids": []}),
        ("token_ids", {"token_ids": None}),
        ("max_tokens", {"token_ids": [5] * 250}),
        ("temperature", {"sampling_options": {"temperature": -1.0}}),
        ("sampling_options.best_of", {"sampling_options": {"best_of": 2}}),
        ("sampling_options.use_beam_search", {"sampling_options": {"use_beam_search": True}}),
        ("sampling_options.length_penalty", {"sampling_options": {"length_penalty": 1.5}}),
        ("sampling_options.allowed_token_ids", {"sampling_options": {"allowed_token_ids": [5]}}),
        ("stop_conditions.min_tokens", {"stop_conditions": {"min_tokens": 3}}),
        ("stop_conditions.max_thinking_tokens", {"stop_conditions": {"max_thinking_tokens": 3}}),
        ("output_options.prompt_logprobs", {"output_options": {"prompt_logprobs": 0}}),
        ("prompt_embeds", {"prompt_embeds": "AAAA"}),
        ("multi_modal_data", {"multi_modal_data": {"image_url": []}}),
        ("routing.lora_name", {"routing": {"lora_name": "l"}}),
        (
            "guided_decoding.structural_tag",
            {"sampling_options": {"guided_decoding": {"structural_tag": {}}}},
        ),
    ],
)
def test_what_there_is_not_is_refused_by_name(where: str, parts: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as raised:
        generations_of(request(**parts), CARD)
    assert raised.value.status == 400
    assert raised.value.param == where


@pytest.mark.parametrize(
    "parts",
    [
        {"sampling_options": {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0}},
        {"stop_conditions": {"min_tokens": 0}},
        {"routing": {"lora_name": None, "dp_rank": 0}, "extra_args": {"x": 1}},
        {"multi_modal_data": {}},
    ],
)
def test_what_asks_for_nothing_is_no_harm(parts: dict[str, Any]) -> None:
    assert len(generations_of(request(**parts), CARD)) == 1
