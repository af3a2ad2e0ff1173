"""Ids of tokens, read from streams as servers send them."""

from __future__ import annotations

import json

import pytest

from coldframe.benchmarks.http_client import Answer, completion, token_ids
from coldframe.loader.errors import PlatformError


def event(*ids: int, **more: object) -> str:
    return f"data: {json.dumps({'choices': [{'token_ids': list(ids), **more}]})}\n\n"


def answer(*events: str, chunk: int | None = None) -> Answer:
    body = "".join(events).encode()
    if chunk is None:
        return Answer(0, 1, 2, {}, body)
    parts = [body[at : at + chunk] for at in range(0, len(body), chunk)]
    sent = b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts)
    return Answer(0, 1, 2, {"transfer-encoding": "chunked"}, sent + b"0\r\n\r\n")


STREAM = (
    event(7),
    event(8, 9),
    'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n',
    "data: [DONE]\n\n",
)


@pytest.mark.parametrize("chunk", [None, 1, 7, 4096])
def test_a_stream_in_chunks_of_any_size(chunk: int | None) -> None:
    assert token_ids(answer(*STREAM, chunk=chunk)) == [7, 8, 9]


def test_a_stream_that_fails_or_breaks_off() -> None:
    with pytest.raises(PlatformError, match="mid-stream"):
        token_ids(answer(event(7), 'data: {"error": {"message": "gone"}}\n\n'))
    with pytest.raises(PlatformError, match="no end"):
        token_ids(answer(event(7)))


def test_ids_are_asked_for_where_they_are_wanted() -> None:
    assert "return_token_ids" not in json.loads(completion("m", [5], 2, stream=True))
    asked = json.loads(completion("m", [5], 2, stream=True, ids=True))
    assert asked["return_token_ids"] is True
