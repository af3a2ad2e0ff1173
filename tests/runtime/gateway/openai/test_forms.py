"""Structured output: each way to ask for it, and what is refused, with and without vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coldframe.runtime.engine.structure import MAX_SPEC, Structure
from coldframe.runtime.gateway.api import ModelCard
from coldframe.runtime.gateway.openai.prepare import Prepared, prepare_chat, prepare_completion
from tests.runtime.gateway.openai.conftest import fill_in

Ready = Callable[..., Prepared]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_JSON = Structure("json", json.dumps(SCHEMA, separators=(",", ":")))


@pytest.fixture(scope="module")
def kinds(card: ModelCard) -> dict[str, Ready]:
    """Both kinds of request to a replica that has vLLM."""
    with_vllm = replace(card, vllm=True)
    messages = [{"role": "user", "content": "Hi"}]
    return {
        "completion": lambda **fields: prepare_completion({"prompt": "Hi", **fields}, with_vllm),
        "chat": lambda **fields: prepare_chat({"messages": messages, **fields}, with_vllm, fill_in),
    }


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize(
    ("fields", "structure"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structure("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            AS_JSON,
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            Structure("json_object"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, AS_JSON),
        ({"structured_outputs": {"json": json.dumps(SCHEMA), "regex": None}}, AS_JSON),
        ({"structured_outputs": {"json_object": True}}, Structure("json_object")),
        ({"structured_outputs": {"regex": "a+"}}, Structure("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Structure("choice", '["a", "b"]')),
        ({"structured_outputs": {"grammar": "root ::= x"}}, Structure("grammar", "root ::= x")),
        ({"guided_json": SCHEMA}, AS_JSON),
        ({"guided_regex": "a+"}, Structure("regex", "a+")),
        ({"guided_choice": ["a"]}, Structure("choice", '["a"]')),
        ({"guided_grammar": "root ::= x"}, Structure("grammar", "root ::= x")),
        ({"guided_json": SCHEMA, "response_format": {"type": "text"}}, AS_JSON),
    ],
)
def test_each_way_to_say_it(
    kinds: dict[str, Ready], kind: str, fields: Any, structure: Structure | None
) -> None:
    ready = kinds[kind](n=2, **fields)
    assert [each.params.structured for each in ready.generations] == [structure] * 2
    assert {each.params.needs for each in ready.generations} == {structure and "vllm"}


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"a": float("nan")}}, "guided_json"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "x" * (MAX_SPEC + 1)}, "guided_regex"),
        ({"guided_regex": "\ud800"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"guided_choice": ["a", ""]}, "guided_choice[1]"),
        ({"guided_json": {}, "guided_regex": "x"}, "guided_regex"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
    ],
)
def test_what_is_no_form(
    kinds: dict[str, Ready], refusal: Any, kind: str, fields: Any, param: str
) -> None:
    error = refusal(kinds[kind], **fields)
    assert (error.status, error.param) == (400, param)


def test_what_has_a_form_ends_with_it(kinds: dict[str, Ready], refusal: Any) -> None:
    error = refusal(kinds["chat"], ignore_eos=True, guided_regex="a+")
    assert (error.status, error.param) == (400, "ignore_eos")
    assert not kinds["chat"](ignore_eos=False, guided_regex="a+").generations[0].params.ignore_eos
    assert kinds["chat"](ignore_eos=True).generations[0].params.ignore_eos


def test_without_vllm_the_error_says_how_to_have_it(chat: Ready, refusal: Any) -> None:
    error = refusal(chat, response_format={"type": "json_object"})
    assert (error.param, error.code) == ("response_format", "unsupported")
    assert "--decode native,vllm" in error.message
