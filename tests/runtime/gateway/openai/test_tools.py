"""Tools: what a chat may offer, what is refused, and the calls in an answer, however it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from coldframe.runtime.gateway.api import ModelCard, Piece
from coldframe.runtime.gateway.openai import schemas
from coldframe.runtime.gateway.openai.answers import Chunks, document
from coldframe.runtime.gateway.openai.prepare import Prepared, prepare_chat
from coldframe.runtime.gateway.openai.tool_calls import CallReader
from tests.runtime.gateway.chat_templates import TEMPLATES, TOOLS
from tests.runtime.gateway.openai.conftest import fill_in

Ready = Callable[..., Prepared]
CITY = TOOLS[0]["function"]["parameters"]
CALL = '{"name": "get_weather", "arguments": {"city": "Köln"}}'
CALLED = "messages[0].tool_calls[0].function.arguments"
SURROGATE = {"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
LIST = {"name": "f", "arguments": "[]"}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def model(card: ModelCard) -> ModelCard:
    return replace(card, vllm=True, context_length=4096, chat_template=TEMPLATES["qwen-3"])


@pytest.fixture(scope="module")
def asking(model: ModelCard) -> Ready:
    """`asking(tool_choice="required")`: a chat with tools, ready."""
    messages = [{"role": "user", "content": "Hi"}]
    body = {"messages": messages, "tools": TOOLS}
    return lambda **more: prepare_chat({**body, **more}, model, fill_in)


def answers(ready: Prepared, card: ModelCard, text: str, size: int, finish: str = "stop") -> Any:
    """The choice of an answer that comes so many characters at a time, whole and put together of
    its chunks, which have to be the same."""
    parts = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    ends = [None] * (len(parts) - 1) + [finish]
    pieces = [Piece(0, 7, part, end, 3) for part, end in zip(parts, ends, strict=True)]
    whole = document(ready, card, pieces, id="x", created=1)
    jsonschema_rs.validate(schemas.CHAT_ANSWER, whole)
    choice = ChatCompletion.model_validate(whole).choices[0]
    stream = Chunks(ready, card, id="x", created=1)
    content, calls, ended = "", {}, None  # type: ignore[var-annotated]
    for piece in pieces:
        for chunk in stream.of(piece):
            told = ChatCompletionChunk.model_validate(chunk).choices[0]
            content += told.delta.content or ""
            ended = told.finish_reason or ended
            for call in told.delta.tool_calls or ():
                assert call.function is not None
                assert call.index not in calls
                calls[call.index] = (call.function.name, call.function.arguments)
    assert content == (choice.message.content or "")
    assert ended == choice.finish_reason
    made = choice.message.tool_calls or []
    assert [calls[i] for i in range(len(calls))] == [
        (call.function.name, call.function.arguments)  # type: ignore[union-attr]
        for call in made
    ]
    assert len({call.id for call in made}) == len(made)
    return choice


def test_the_template_is_told_and_nothing_is_forced(asking: Ready) -> None:
    ready = asking()
    (one,) = ready.generations
    assert isinstance(one.prompt, str)
    assert "get_weather" in one.prompt
    assert one.params.structured is None
    assert asking(tool_choice="auto") == ready


def test_none_is_told_of_none(asking: Ready) -> None:
    ready = asking(tool_choice="none")
    assert ready.tools is None
    assert "get_weather" not in str(ready.generations[0].prompt)


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_calls_beside_text(asking: Ready, model: ModelCard, size: int) -> None:
    text = f"Let me <see>.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>"
    choice = answers(asking(), model, text, size)
    assert choice.message.content == "Let me <see>.\n"
    assert [c.function.name for c in choice.message.tool_calls] == ["get_weather"] * 2
    assert json.loads(choice.message.tool_calls[1].function.arguments) == {"city": "Köln"}
    assert choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "No need.",
        "a <tool_cal",
        "<tool_call>not json</tool_call> and on",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": null}</tool_call>',
        '<tool_call>{"name": "f", "arguments": ["a"]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "Ulm"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        "<tool_call></tool_call></tool_call><tool_call>",
        '<tool_call>{"name": "get_weather", "arg',
    ],
)
def test_what_is_no_call_stays_text(asking: Ready, model: ModelCard, text: str, size: int) -> None:
    choice = answers(asking(), model, text, size)
    assert choice.message.content == text
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


def test_a_call_that_ends_the_answer_needs_no_last_tag(asking: Ready, model: ModelCard) -> None:
    choice = answers(asking(), model, f"<tool_call>{CALL}", 4)
    assert choice.message.content is None
    assert len(choice.message.tool_calls) == 1


class Place(BaseModel):
    city: str
    near: list[Place] = []


class Trip(BaseModel):
    start: Place
    stops: list[Place]


def test_functions_whose_parameters_refer_to_parts_of_themselves(asking: Ready) -> None:
    own = {"type": "object", "properties": {"a": {"type": "integer"}, "next": {"$ref": "#"}}}
    told = {"const": {"$ref": "#/$defs/Place"}}
    odd = {"$id": "x:y", "properties": {"a": told, "default": {"$ref": "#/properties/a"}}}
    offered = {"go": Trip.model_json_schema(), "at": Place.model_json_schema(), "b": own, "c": odd}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in offered.items()
    ]
    structure = asking(tools=tools, tool_choice="required").generations[0].params.structured
    assert structure is not None
    validator = jsonschema_rs.validator_for(structure.value())
    ulm = {"city": "Ulm", "near": [{"city": "Blaubeuren"}]}
    for name, parameters, good in (
        ("go", {"start": ulm, "stops": [ulm]}, True),
        ("go", {"start": ulm, "stops": [{"near": []}]}, False),
        ("at", ulm, True),
        ("at", {"city": "Ulm", "near": [{}]}, False),
        ("b", {"next": {"next": {"a": 1}}}, True),
        ("b", {"next": {"next": {"a": "1"}}}, False),
        ("c", {"default": told["const"]}, True),
        ("c", {"default": {"$ref": "#/$defs/f3/$defs/Place"}}, False),
    ):
        assert validator.is_valid([{"name": name, "parameters": parameters}]) is good, (name, good)


def test_no_schema_of_a_tool_holds_up_the_engine(asking: Ready, refusal: Any) -> None:
    schema: dict[str, Any] = {}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    tools = [{"type": "function", "function": function}]
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        error = refusal(asking, tools=tools, tool_choice=choice)
        assert (error.status, error.param) == (400, "tools")
        assert "64" in error.message
    assert asking(tools=tools).tools is not None  # to the template it is text


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "f"}', {}),
        ('{"name": "f", "parameters": {"a": 1}}', {"a": 1}),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', {"a": 1}),
        ('{"name": "f", "arguments": {"a": "/tool_call"}}', {"a": "/tool_call"}),
    ],
)
def test_what_was_called_may_come_back(
    asking: Ready, model: ModelCard, written: str, arguments: Any, size: int
) -> None:
    choice = answers(asking(), model, f"<tool_call>\n{written}\n</tool_call>", size)
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments) == arguments
    told = choice.message.model_dump(exclude_none=True)
    messages = [
        {"role": "user", "content": "Hi"},
        told,
        {"role": "tool", "tool_call_id": call.id, "content": "x"},
    ]
    again = str(asking(messages=messages).generations[0].prompt)
    assert json.dumps({"name": "f", "arguments": arguments}) in again


def test_a_long_call_is_searched_once(asking: Ready) -> None:
    use = asking().tools
    assert use is not None
    reader = CallReader(use)
    reader.push("<tool_call>")
    began = time.process_time()
    for _ in range(60_000):  # of which each would have been searched from the beginning
        assert reader.push("x" * 20) == ("", [])
    text, calls = reader.push("</tool_call>")
    assert time.process_time() - began < 5
    assert (len(text), calls) == (23 + 20 * 60_000, [])


def test_one_call_alone_ends_the_answer(asking: Ready, model: ModelCard) -> None:
    ready = asking(parallel_tool_calls=False, stop=["###"])
    assert ready.generations[0].params.stop == ("###", "</tool_call>")
    assert asking(parallel_tool_calls=True).generations[0].params.stop == ()
    choice = answers(ready, model, f"<tool_call>\n{CALL}\n", 5)  # what a stop leaves
    assert len(choice.message.tool_calls) == 1
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


@pytest.mark.parametrize("taught", ["<function=name>", "<arg_key>key</arg_key>"])
def test_templates_of_other_calls_between_the_same_tags(
    model: ModelCard, refusal: Any, taught: str
) -> None:
    other = replace(model, chat_template=f"<tool_call>{taught}</tool_call>{TEMPLATES['qwen-3']}")
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    error = refusal(lambda: prepare_chat(body, other, fill_in))
    assert (error.param, error.code) == ("tools", "unsupported")


@pytest.mark.parametrize("size", [1, 1000])
def test_who_has_to_call_is_held_to_it(asking: Ready, model: ModelCard, size: int) -> None:
    ready = asking(tool_choice="required", parallel_tool_calls=False)
    structure = ready.generations[0].params.structured
    assert structure is not None
    validator = jsonschema_rs.validator_for(structure.value())
    made = [{"name": "get_weather", "parameters": {"city": "Köln"}}]
    assert validator.is_valid(made)
    assert not validator.is_valid(made * 2)
    assert not validator.is_valid([])
    choice = answers(ready, model, json.dumps(made), size)
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Köln"}
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    cut = answers(ready, model, '[{"name": "get', size, finish="length")
    assert (cut.message.content, cut.finish_reason) == ('[{"name": "get', "length")


def test_a_function_by_its_name(asking: Ready, model: ModelCard) -> None:
    ready = asking(tool_choice=NAMED)
    structure = ready.generations[0].params.structured
    assert structure is not None
    assert structure.value() == CITY
    choice = answers(ready, model, '{"city": "Ulm"}', 2)
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Ulm"}'
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("nothing", ["", None, "{}"])
def test_a_call_without_arguments(asking: Ready, nothing: str | None) -> None:
    calls = [{"id": "1", "function": {"name": "now", "arguments": nothing}}]
    messages = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "now"},
    ]
    assert '{"name": "now", "arguments": {}}' in str(
        asking(messages=messages).generations[0].prompt
    )


def test_what_was_called_before_goes_to_the_template(asking: Ready) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Ulm"}'}
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "cold"},
    ]
    prompt = str(asking(messages=messages).generations[0].prompt)
    assert '{"name": "get_weather", "arguments": {"city": "Ulm"}}' in prompt
    assert "<tool_response>\ncold" in prompt


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": TOOLS[0]}, "tools"),
        ({"tools": TOOLS * 2}, "tools[1].function.name"),
        ({"tools": [{"type": "code"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        ({"tools": None, "tool_choice": "auto"}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tool_choice": NAMED, "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": "auto", "guided_regex": "a"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"messages": [{"role": "assistant", "tool_calls": [SURROGATE]}]}, CALLED),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": LIST}]}]}, CALLED),
    ],
)
def test_what_is_wrong(asking: Ready, refusal: Any, more: Any, param: str) -> None:
    error = refusal(asking, **more)
    assert (error.status, error.param) == (400, param)


def test_what_cannot_be_had_is_refused(chat: Any, refusal: Any, model: ModelCard) -> None:
    error = refusal(chat, tools=TOOLS)  # whose template knows no calls
    assert (error.param, error.code) == ("tools", "unsupported")
    without = replace(model, vllm=False)
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    error = refusal(
        lambda **more: prepare_chat({**body, **more}, without, fill_in), tool_choice=NAMED
    )
    assert (error.param, error.code) == ("tool_choice", "unsupported")
    assert "--decode native,vllm" in error.message
