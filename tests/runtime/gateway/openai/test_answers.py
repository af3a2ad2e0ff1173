"""Pieces to answers, read back with openai-python's own types."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from coldframe.runtime.gateway.api import ApiError, ModelCard, Piece, TokenLogprob
from coldframe.runtime.gateway.openai.answers import Chunks, document, fingerprint
from coldframe.runtime.gateway.openai.prepare import Prepared

HEAD = {"id": "cmpl-1", "created": 1_700_000_123}


def piece(
    text: str = "x", *, choice: int = 0, finish: str | None = None, prompt: int = 3, **more: Any
) -> Piece:
    return Piece(choice, 5, text, finish, prompt, **more)


def likely(text: bytes, logprob: float = -0.5, token: int = 5) -> TokenLogprob:
    return TokenLogprob(token, logprob, text)


def whole(ready: Prepared, card: ModelCard, pieces: Sequence[Piece]) -> Any:
    made = document(ready, card, pieces, id="cmpl-1", created=HEAD["created"])
    kind = ChatCompletion if ready.kind == "chat" else Completion
    return kind.model_validate_json(json.dumps(made, allow_nan=False), strict=True)


def parts(ready: Prepared, card: ModelCard, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    stream = Chunks(ready, card, id="cmpl-1", created=HEAD["created"])
    made = [chunk for one in pieces for chunk in stream.of(one)]
    last = stream.last()
    return made if last is None else [*made, last]


def read_chunk(chunk: dict[str, Any]) -> Any:
    """A chunk by openai-python's type."""
    if chunk["object"] == "chat.completion.chunk":
        return ChatCompletionChunk.model_validate(chunk, strict=True)
    # The type is that of whole completions, in which each choice has a finish_reason.
    choices = [{**choice, "finish_reason": "stop"} for choice in chunk["choices"]]
    return Completion.model_validate({**chunk, "choices": choices}, strict=True)


def test_a_completion(completion: Any, card: ModelCard) -> None:
    answer = whole(completion(), card, [piece("Hel"), piece(""), piece("lo", finish="length")])
    assert (answer.id, answer.created, answer.model) == ("cmpl-1", HEAD["created"], "demo")
    assert answer.object == "text_completion"
    assert answer.system_fingerprint == fingerprint(card)
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, "Hello", "length")
    assert choice.logprobs is None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens": 3,
        "total_tokens": 6,
    }


def test_a_chat(chat: Any, card: ModelCard) -> None:
    answer = whole(chat(), card, [piece("Hel"), piece("lo", finish="stop")])
    assert answer.object == "chat.completion"
    assert answer.service_tier is None
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello")
    assert choice.message.refusal is None
    assert choice.message.tool_calls is None


def test_choices_stand_in_order_and_a_prompt_counts_once(completion: Any, card: ModelCard) -> None:
    ready = completion(prompt=["a", "b"], n=2)
    pieces = [
        piece("d", choice=3, prompt=7, cached_tokens=6),
        piece("b", choice=1, cached_tokens=1),
        piece("", choice=3, finish="stop", prompt=7),
        piece("c", choice=2, finish="length", prompt=7, cached_tokens=4),
        piece("a", choice=0, finish="stop"),
        piece("", choice=1, finish="length"),
    ]
    answer = whole(ready, card, pieces)
    texts = [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices]
    assert texts == [(0, "a", "stop"), (1, "b", "length"), (2, "c", "length"), (3, "d", "stop")]
    assert answer.usage.prompt_tokens == 3 + 7
    assert answer.usage.prompt_tokens_details.cached_tokens == 0 + 4  # what no choice computed
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == 16


def test_an_answer_without_an_end_is_an_error(completion: Any, card: ModelCard) -> None:
    with pytest.raises(ApiError) as caught:
        document(completion(), card, [piece("x")], id="", created=0)
    assert caught.value.status == 500


EURO = "\u20ac".encode()
TOKENS = [
    piece("a", logprob=likely(b"a"), top=(likely(b"a"), likely(b"b", -1.5))),
    # A character in two tokens: the first has no text of its own.
    piece("", logprob=likely(EURO[:2], -0.25), top=(likely(EURO[:2], -0.25), likely(b"\xff", -3))),
    piece("\u20ac", logprob=likely(EURO[2:], -9), top=(likely(b"z", -0.1), likely(b"y", -2))),
    piece("", finish="stop", logprob=likely(b"</s>", -math.inf), top=(likely(b"q"), likely(b"r"))),
]
COLUMNS = {
    "tokens": ["a", "\ufffd", "\ufffd", "</s>"],
    "token_logprobs": [-0.5, -0.25, -9, -9999],
    "top_logprobs": [
        {"a": -0.5, "b": -1.5},
        # Two tokens, one text: the likelier has it.
        {"\ufffd": -0.25},
        {"z": -0.1, "y": -2, "\ufffd": -9},
        {"q": -0.5, "r": -0.5, "</s>": -9999},
    ],
    "text_offset": [0, 1, 1, 2],
}


def test_log_probabilities_of_a_completion(completion: Any, card: ModelCard) -> None:
    ready = completion(logprobs=2)
    (choice,) = whole(ready, card, TOKENS).choices
    assert choice.text == "a\u20ac"
    assert choice.logprobs.model_dump() == COLUMNS


def test_log_probabilities_of_a_chat(chat: Any, card: ModelCard) -> None:
    ready = chat(logprobs=True, top_logprobs=2)
    (choice,) = whole(ready, card, TOKENS).choices
    assert choice.logprobs.refusal is None
    content = choice.logprobs.content
    assert [entry.token for entry in content] == COLUMNS["tokens"]
    assert [entry.logprob for entry in content] == COLUMNS["token_logprobs"]
    assert b"".join(bytes(entry.bytes) for entry in content) == "a\u20ac</s>".encode()
    assert [(top.token, top.logprob, top.bytes) for top in content[2].top_logprobs] == [
        ("z", -0.1, [ord("z")]),
        ("y", -2, [ord("y")]),
    ]


def test_streamed_log_probabilities_are_the_same(
    completion: Any, chat: Any, card: ModelCard
) -> None:
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for chunk in parts(completion(logprobs=2, stream=True), card, TOKENS):
        logprobs = read_chunk(chunk).choices[0].logprobs
        for name, entries in (logprobs.model_dump() if logprobs else {}).items():
            columns[name] += entries
    assert columns == COLUMNS

    ready = chat(logprobs=True, top_logprobs=2, stream=True)
    read = [read_chunk(chunk).choices[0].logprobs for chunk in parts(ready, card, TOKENS)]
    entries = [entry for logprobs in read if logprobs for entry in logprobs.content]
    assert entries == whole(ready, card, TOKENS).choices[0].logprobs.content


def test_log_probabilities_not_asked_for_are_not_told(chat: Any, card: ModelCard) -> None:
    assert whole(chat(), card, TOKENS).choices[0].logprobs is None
    for chunk in parts(chat(stream=True), card, TOKENS):
        assert read_chunk(chunk).choices[0].logprobs is None


def test_ids_of_tokens_where_they_are_asked_for(
    completion: Any, chat: Any, card: ModelCard
) -> None:
    # Of a character in two tokens the first has no text; its id is sent all the same, at once.
    pieces = [
        Piece(0, 7, "", None, 3),
        Piece(0, 9, "\u20ac", None, 3),
        Piece(0, 2, "", "length", 3),
    ]
    for make, text in ((completion, "text"), (chat, "delta")):
        (choice,) = document(make(return_token_ids=True), card, pieces, id="", created=0)["choices"]
        assert choice["token_ids"] == [7, 9, 2]
        made = parts(make(return_token_ids=True, stream=True), card, pieces)
        told = [chunk["choices"][0] for chunk in made if "token_ids" in chunk["choices"][0]]
        assert [choice["token_ids"] for choice in told] == [[7], [9], [2]]
        content = "\u20ac" if text == "text" else {"content": "\u20ac"}
        assert told[1][text] == content
        assert made[-1]["choices"][0]["finish_reason"] == "length"
        (choice,) = document(make(), card, pieces, id="", created=0)["choices"]
        assert "token_ids" not in choice
        plain = parts(make(stream=True), card, pieces)
        assert not any("token_ids" in chunk["choices"][0] for chunk in plain)


def test_a_streamed_chat(chat: Any, card: ModelCard) -> None:
    pieces = [piece("Hel"), piece(""), piece("lo", finish="length")]
    made = parts(chat(stream=True), card, pieces)
    read = [read_chunk(chunk) for chunk in made]
    assert [chunk["choices"][0]["delta"] for chunk in made] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk.choices[0].finish_reason for chunk in read] == [None, None, None, "length"]
    heads = {(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in read}
    assert heads == {("cmpl-1", HEAD["created"], "demo", fingerprint(card))}
    assert all("usage" not in chunk for chunk in made)


def test_a_streamed_completion(completion: Any, card: ModelCard) -> None:
    made = parts(completion(stream=True), card, [piece("Hi"), piece("", finish="stop")])
    assert [read_chunk(chunk).choices[0].text for chunk in made] == ["Hi", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in made] == [None, "stop"]


def test_streamed_choices_each_have_a_beginning_and_an_end(chat: Any, card: ModelCard) -> None:
    pieces = [
        piece("b", choice=1),
        piece("a", choice=0),
        piece("", choice=0, finish="stop"),
        piece("B", choice=1, finish="length"),
    ]
    made = [read_chunk(chunk).choices[0] for chunk in parts(chat(stream=True, n=2), card, pieces)]
    for index, text, finish in [(0, "a", "stop"), (1, "bB", "length")]:
        own = [choice for choice in made if choice.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == text
        assert [choice.finish_reason for choice in own if choice.finish_reason] == [finish]
        assert own[-1].finish_reason == finish


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_the_usage_of_a_stream(kind: str, card: ModelCard, request: pytest.FixtureRequest) -> None:
    ready = request.getfixturevalue(kind)(stream=True, stream_options={"include_usage": True}, n=2)
    pieces = [piece("a"), piece("b", choice=1, finish="stop"), piece("", finish="stop")]
    made = parts(ready, card, pieces)
    assert all(chunk["usage"] is None for chunk in made[:-1])
    last = read_chunk(made[-1])
    assert last.choices == []
    usage = last.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 3, 6)
