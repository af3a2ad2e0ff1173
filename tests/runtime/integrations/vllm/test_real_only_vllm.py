"""What only vLLM can serve, through a whole server and OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.runtime.serving import Server, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(200)]

Make = Callable[..., Path]
HELLO: Any = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
AS_SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
MODEL = "tiny-llama-float32"
FLAGS = ("--vllm-kv", "64MiB", "--kv-memory", "64MiB", "--threads", "1")


@pytest.fixture(scope="module")
def bridged(demo_model: Make) -> Iterator[Server]:
    """A server whose vLLM starts behind the first token."""
    with served(demo_model(), "--decode", "native,vllm", *FLAGS) as server:
        yield server


@pytest.fixture
def client(bridged: Server) -> Iterator[OpenAI]:
    with bridged.openai(timeout=150, max_retries=0) as made:
        yield made


def test_a_schema_is_kept_to_by_the_very_first_request(client: OpenAI) -> None:
    """It waits for vLLM, where native workers would be there at once."""
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, response_format=AS_SCHEMA, temperature=1.3, seed=3, n=2
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        value = json.loads(choice.message.content or "")
        assert set(value) == {"name", "old"}
        assert value["name"] in ("ada", "bob")


def test_it_streams_and_repeats_itself(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "seed": 5, "temperature": 1.0}
    asked["response_format"] = AS_SCHEMA
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = client.chat.completions.create(**asked, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole
    json.loads(text)


def test_completions_and_vllms_own_fields(client: OpenAI) -> None:
    def complete(**more: Any) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=40, temperature=0, extra_body=more
        )
        return answer.choices[0].text

    assert complete(guided_choice=["yes", "no"]) in ("yes", "no")
    assert complete(structured_outputs={"regex": "[ab]{3}"}) in {
        a + b + c for a in "ab" for b in "ab" for c in "ab"
    }
    assert complete(guided_grammar='root ::= "x" | "y"') in ("x", "y")


def test_a_schema_without_sense_is_refused_and_others_go_on(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=4, extra_body={"guided_regex": "(["}
        )
    assert "vLLM does not take this request" in str(caught.value)
    answer = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
