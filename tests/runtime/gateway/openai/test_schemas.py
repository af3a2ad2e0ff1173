"""Any JSON gets an answer or an error, and what a schema forbids is refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.runtime.gateway.api import ApiError, ModelCard, Piece, TokenLogprob
from coldframe.runtime.gateway.openai import schemas
from coldframe.runtime.gateway.openai.answers import document
from coldframe.runtime.gateway.openai.prepare import Prepared, prepare_chat, prepare_completion
from coldframe.runtime.gateway.openai.requests import ChatRequest, CompletionRequest
from coldframe.runtime.gateway.openai.service import model, models
from tests.runtime.gateway.openai.conftest import TEMPLATE, fill_in

CARD = ModelCard("demo", 1, 256, 1000, TEMPLATE, {"bos_token": "<s>"}, vllm=True)
SCHEMAS = {"completion": CompletionRequest, "chat": ChatRequest}
BODIES: dict[str, dict[str, Any]] = {
    "completion": {"prompt": "Hi"},
    "chat": {"messages": [{"role": "user", "content": "Hi"}]},
}
NAMES = sorted(
    set(CompletionRequest.model_json_schema()["properties"])
    | set(ChatRequest.model_json_schema()["properties"])
)
PARTS = [{"role": "user", "content": []}, {"type": "text", "text": ""}, {"include_usage": 1}]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 16, 10**4000, -(1 << 63), 1 << 64])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "user", "tool", "text", "none", "auto", "demo"])
)
values = st.recursive(
    scalars | st.sampled_from(PARTS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "name", "7", "x"]) | st.text(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
fields = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), values, max_size=4)
plain = fields.filter(lambda made: _is_plain(made))


def _is_plain(made: object) -> bool:
    """Whether it is JSON that every reader takes alike: finite, no half characters, 64 bits."""
    try:
        json.dumps(made, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return not _has_huge(made)


def _has_huge(made: object) -> bool:
    if isinstance(made, dict):
        return any(_has_huge(value) for value in made.values())
    if isinstance(made, list):
        return any(_has_huge(value) for value in made)
    return isinstance(made, int) and not -(1 << 63) <= made < 1 << 63


def prepare(kind: str, body: object) -> Prepared | ApiError:
    try:
        if kind == "chat":
            return prepare_chat(body, CARD, fill_in)
        return prepare_completion(body, CARD)
    except ApiError as error:
        return error


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(sorted(BODIES)), made=fields, whole=values, drop=st.booleans())
def test_any_json_gets_an_answer_or_an_error(
    kind: str, made: dict[str, Any], whole: object, drop: bool
) -> None:
    for body in ({} if drop else BODIES[kind]) | made, whole:
        ready = prepare(kind, body)
        if isinstance(ready, Prepared):
            assert ready.generations
            continue
        assert ready.status == 400
        told = json.dumps(ready.to_openai(), ensure_ascii=False).encode()
        assert len(told) < 1000
        assert b"pydantic" not in told


@pytest.fixture(scope="module")
def validators() -> dict[str, Any]:
    made = {}
    for kind, request in SCHEMAS.items():
        schema = request.model_json_schema()
        jsonschema_rs.meta.validate(schema)
        assert "$ref" not in json.dumps(schema)
        made[kind] = jsonschema_rs.validator_for(schema)
    return made


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(sorted(BODIES)), made=plain)
def test_what_a_schema_forbids_is_refused(
    validators: dict[str, Any], kind: str, made: dict[str, Any]
) -> None:
    body = BODIES[kind] | made
    ready = prepare(kind, body)
    if isinstance(ready, Prepared):
        assert validators[kind].is_valid(body), body


@pytest.mark.parametrize("kind", sorted(SCHEMAS))
def test_examples_are_right(validators: dict[str, Any], kind: str) -> None:
    for example in SCHEMAS[kind].model_json_schema()["examples"]:
        assert validators[kind].is_valid(example)
        assert isinstance(prepare(kind, example), Prepared)


def test_every_field_is_described() -> None:
    for request in SCHEMAS.values():
        properties = request.model_json_schema()["properties"]
        assert set(request.model_fields) <= set(properties)
        for name, field in properties.items():
            assert field.keys() & {"anyOf", "enum", "type"}, name


@pytest.mark.parametrize("logprobs", [False, True])
def test_answers_are_as_their_schemas_say(logprobs: bool) -> None:
    token = TokenLogprob(5, -0.5, b"x")
    pieces = [Piece(0, 5, "x", None, 3, token, (token,)), Piece(0, 6, "", "stop", 3, token)]
    for kind, schema in (
        ("completion", schemas.COMPLETION_ANSWER),
        ("chat", schemas.CHAT_ANSWER),
    ):
        asked = {"logprobs": (True if kind == "chat" else 1) if logprobs else None}
        ready = prepare(kind, BODIES[kind] | asked)
        assert isinstance(ready, Prepared)
        answer = document(ready, CARD, pieces, id="x", created=1)
        jsonschema_rs.validate(schema, answer)
    jsonschema_rs.validate(schemas.MODEL, model(CARD))
    jsonschema_rs.validate(schemas.MODELS, models({"demo": CARD, "unknown": None}))
    error = prepare("chat", {})
    assert isinstance(error, ApiError)
    jsonschema_rs.validate(schemas.ERROR, error.to_openai())
