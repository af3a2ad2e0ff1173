"""A chat's messages, as a template gets them, and what may not be in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest

from coldframe.loader.errors import CheckpointError, RequestError
from coldframe.runtime.gateway.api import ModelCard
from coldframe.runtime.gateway.openai.prepare import Prepared, prepare_chat


class Recorder:
    """A template engine that keeps what it is given."""

    def __init__(self) -> None:
        self.template = ""
        self.variables: Mapping[str, Any] = {}

    def __call__(self, template: str, variables: Mapping[str, Any]) -> str:
        self.template, self.variables = template, variables
        return "prompt"


def variables_of(card: ModelCard, messages: list[Any], **fields: Any) -> Mapping[str, Any]:
    recorder = Recorder()
    ready = prepare_chat({"messages": messages, **fields}, card, recorder)
    assert recorder.template == card.chat_template
    assert [generation.prompt for generation in ready.generations] == ["prompt"] * ready.n
    return recorder.variables


def test_variables_are_those_that_transformers_gives(card: ModelCard) -> None:
    message = {"role": "user", "content": "Hi", "name": "Kim", "unknown": 5}
    assert variables_of(card, [message]) == {
        "messages": [{"role": "user", "content": "Hi", "name": "Kim"}],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }


def test_the_template_is_filled_in(chat: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None},
        {"role": "assistant", "tool_calls": [], "name": None},
        {"role": "user", "content": ""},
    ]
    (generation,) = chat(messages=messages).generations
    expected = "<s><system>Be brief.<user>a\nb<assistant><assistant><user><assistant>"
    assert generation.prompt == expected


def test_developer_is_system_where_the_template_does_not_know_it(card: ModelCard) -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert variables_of(card, messages)["messages"][0]["role"] == "system"
    knows = dataclasses.replace(card, chat_template="{% if role == 'developer' %}")
    assert variables_of(knows, messages)["messages"][0]["role"] == "developer"


def test_what_a_request_may_tell_the_template(card: ModelCard) -> None:
    kwargs = {"enable_thinking": False, "style": "plain", "level": 3, "t": 0.5, "nothing": None}
    user = [{"role": "user", "content": "x"}]
    variables = variables_of(
        card, user, chat_template_kwargs=kwargs, add_generation_prompt=False, temperature=0
    )
    assert {name: variables[name] for name in kwargs} == kwargs
    assert variables["add_generation_prompt"] is False


@pytest.mark.parametrize(
    "kwargs",
    [
        {"messages": "x"},
        {"tools": None},
        {"add_generation_prompt": False},
        {"bos_token": ""},
        {"eos_token": "x"},
        {"a": []},
        {"a": {"b": 1}},
        {"a": math.inf},
        {"a": "\ud800"},
        {"a b": 1},
        {"\u00e4": 1},
        {"\ud800": 1},
        {"": 1},
        {"a" * 513: 1},
        {f"a{i}": 1 for i in range(33)},
        ["a"],
        "a",
    ],
)
def test_what_it_may_not(chat: Any, refusal: Any, kwargs: Any) -> None:
    error = refusal(chat, chat_template_kwargs=kwargs)
    assert (error.status, error.param.partition(".")[0]) == (400, "chat_template_kwargs")
    error.message.encode()


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ("Hi", "messages[1]", "invalid_type"),
        (None, "messages[1]", "invalid_type"),
        ({"content": "x"}, "messages[1].role", "missing_required_parameter"),
        ({"role": 5, "content": "x"}, "messages[1].role", "invalid_value"),
        ({"role": "robot", "content": "x"}, "messages[1].role", "invalid_value"),
        ({"role": ["user"], "content": "x"}, "messages[1].role", "invalid_value"),
        (
            {"role": "tool", "content": "x"},
            "messages[1].tool_call_id",
            "missing_required_parameter",
        ),
        (
            {"role": "tool", "tool_call_id": "1"},
            "messages[1].content",
            "missing_required_parameter",
        ),
        (
            {"role": "user", "content": "x", "tool_calls": [{}]},
            "messages[1].tool_calls",
            "invalid_value",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "messages[1].tool_calls[0].function.arguments",
            "invalid_value",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
            "messages[1].tool_calls[0].function.name",
            "invalid_type",
        ),
        ({"role": "function", "name": "f", "content": "x"}, "messages[1].role", "unsupported"),
        ({"role": "user"}, "messages[1].content", "missing_required_parameter"),
        ({"role": "user", "content": None}, "messages[1].content", "invalid_type"),
        ({"role": "user", "content": 5}, "messages[1].content", "invalid_type"),
        ({"role": "user", "content": {"type": "text"}}, "messages[1].content", "invalid_type"),
        ({"role": "user", "content": []}, "messages[1].content", "invalid_value"),
        ({"role": "user", "content": "\udc00"}, "messages[1].content", "invalid_value"),
        ({"role": "user", "content": ["x"]}, "messages[1].content[0]", "invalid_type"),
        ({"role": "user", "content": "x", "name": 5}, "messages[1].name", "invalid_type"),
        ({"role": "user", "content": "x", "name": ""}, "messages[1].name", "invalid_value"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
            "messages[1].tool_calls[0]",
            "invalid_type",
        ),
        (
            {"role": "assistant", "content": "x", "function_call": {"name": "f"}},
            "messages[1].function_call",
            "unsupported",
        ),
        (
            {"role": "assistant", "audio": {"id": "1"}},
            "messages[1].audio",
            "unsupported",
        ),
    ],
)
def test_wrong_messages(chat: Any, refusal: Any, message: Any, param: str, code: str) -> None:
    error = refusal(chat, messages=[{"role": "user", "content": "fine"}, message])
    assert (error.status, error.param, error.code) == (400, param, code)


@pytest.mark.parametrize(
    ("part", "param", "code"),
    [
        ({}, "type", "missing_required_parameter"),
        ({"type": 5}, "type", "invalid_type"),
        ({"type": "text"}, "text", "missing_required_parameter"),
        ({"type": "text", "text": None}, "text", "invalid_type"),
        ({"type": "text", "text": "\ud800"}, "text", "invalid_value"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "type", "unsupported"),
        ({"type": "input_audio", "input_audio": {}}, "type", "unsupported"),
        ({"type": "file", "file": {}}, "type", "unsupported"),
        ({"type": "refusal", "refusal": "no"}, "type", "unsupported"),
    ],
)
def test_wrong_parts(chat: Any, refusal: Any, part: Any, param: str, code: str) -> None:
    content = [{"type": "text", "text": "fine"}, part]
    error = refusal(chat, messages=[{"role": "user", "content": content}])
    assert (error.status, error.code) == (400, code)
    assert error.param == f"messages[0].content[1].{param}"


def test_images_are_refused(chat: Any, refusal: Any) -> None:
    content = [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]
    error = refusal(chat, messages=[{"role": "user", "content": content}])
    assert (error.param, error.code) == ("messages[0].content[0].type", "unsupported")


@pytest.mark.parametrize("messages", [None, "Hi", {}, [], [{"role": "user"}] * 4097])
def test_what_are_no_messages(chat: Any, refusal: Any, messages: Any) -> None:
    error = refusal(chat, messages=messages)
    assert (error.status, error.param) == (400, "messages")


def test_a_model_without_a_template(card: ModelCard, refusal: Any) -> None:
    plain = dataclasses.replace(card, chat_template=None)
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    error = refusal(lambda: prepare_chat(body, plain, Recorder()))
    assert (error.status, error.code) == (400, "no_chat_template")
    assert "/v1/completions" in error.message
    assert "--chat-template FILE" in error.message


def test_a_template_that_refuses(card: ModelCard, refusal: Any) -> None:
    def failing(error: Exception) -> Prepared:
        def render(template: str, variables: Mapping[str, Any]) -> str:
            raise error

        return prepare_chat({"messages": [{"role": "user", "content": "Hi"}]}, card, render)

    refused = RequestError("the roles must alternate", where="messages")
    error = refusal(lambda: failing(refused))
    assert (error.status, error.param) == (400, "messages")
    assert "the roles must alternate" in error.message
    assert refusal(lambda: failing(CheckpointError("it is no template"))).status == 500
