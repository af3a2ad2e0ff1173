"""From a body to the bytes of an answer, over an engine that gives what it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from openai._streaming import SSEDecoder
from openai.pagination import SyncPage
from openai.types import Completion, Model
from openai.types.chat import ChatCompletionChunk

from coldframe.runtime.gateway.api import ApiError, Generation, ModelCard, Piece
from coldframe.runtime.gateway.openai.service import OpenAI, Reply, event, model, models
from tests.runtime.gateway.openai.conftest import fill_in

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


class Given:
    """A stream of these pieces, and then this error."""

    def __init__(self, pieces: Sequence[Piece], error: ApiError | None) -> None:
        self.cancelled = False
        self._pieces = pieces
        self._error = error

    async def __aiter__(self) -> AsyncIterator[Piece]:
        for piece in self._pieces:
            await asyncio.sleep(0)
            yield piece
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.cancelled = True

    def timing(self) -> dict[str, float]:
        return {"queue": 0.5}


class GivenEngine:
    def __init__(
        self, card: ModelCard, pieces: Sequence[Piece] = (), error: ApiError | None = None
    ) -> None:
        self._card = card
        self.stream = Given(pieces, error)
        self.submitted: list[tuple[str, Sequence[Generation], int]] = []

    async def card(self, name: str | None, *, size: int = 0) -> ModelCard:
        if name not in (None, self._card.name):
            raise ApiError(404, "There is none.", param="model", code="model_not_found")
        return self._card

    def submit(self, model: str, generations: Sequence[Generation], *, size: int) -> Given:
        self.submitted.append((model, generations, size))
        return self.stream


PIECES = [Piece(0, 5, "H\u20ac\u2028", None, 3), Piece(0, 6, "llo\n\n", "stop", 3)]


async def start(engine: GivenEngine, kind: Any, body: object) -> Reply:
    return await OpenAI(engine, fill_in).start(kind, body, 17)


async def streamed(reply: Reply) -> bytes:
    return b"".join([part async for part in reply.events()])


def decoded(content: bytes) -> list[str]:
    """The data of server-sent events, as openai-python reads them."""
    events = list(SSEDecoder().iter_bytes(iter([content])))
    assert all(one.event is None for one in events)
    return [one.data for one in events]


def test_a_document(card: ModelCard) -> None:
    engine = GivenEngine(card, PIECES)

    async def ask() -> tuple[Reply, dict[str, Any]]:
        reply = await start(engine, "completion", {"prompt": "Hi", "model": "demo"})
        return reply, await reply.document()

    reply, answer = asyncio.run(ask())
    assert not reply.stream
    assert reply.card is card
    assert reply.timing() == {"queue": 0.5}
    read = Completion.model_validate(answer, strict=True)
    assert read.choices[0].text == "H\u20ac\u2028llo\n\n"
    assert read.id.startswith("cmpl-")
    ((name, generations, size),) = engine.submitted
    assert (name, [each.prompt for each in generations], size) == ("demo", ["Hi"], 17)
    assert not engine.stream.cancelled


def test_events(card: ModelCard) -> None:
    engine = GivenEngine(card, PIECES)

    async def ask() -> bytes:
        body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        reply = await start(engine, "chat", body)
        assert reply.stream
        return await streamed(reply)

    *chunks, done = decoded(asyncio.run(ask()))
    assert done == "[DONE]"
    read = [ChatCompletionChunk.model_validate_json(chunk, strict=True) for chunk in chunks]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in read[:-1])
    assert text == "H\u20ac\u2028llo\n\n"
    assert {chunk.id for chunk in read} == {read[0].id}
    assert read[0].id.startswith("chatcmpl-")
    assert read[-1].usage is not None
    assert not engine.stream.cancelled


def test_an_event_is_one_line_of_utf8() -> None:
    made = event({"text": "\u20ac\r\n\x00\u2028"})
    assert made == 'data: {"text":"\u20ac\\r\\n\\u0000\u2028"}\n\n'.encode()
    assert json.loads(decoded(made)[0]) == {"text": "\u20ac\r\n\x00\u2028"}


FAILED = ApiError(503, "The replica died.", kind="server_error", code="replica_error")


def test_a_failure_before_the_first_event_is_raised(card: ModelCard) -> None:
    engine = GivenEngine(card, [], FAILED)

    async def ask() -> bytes:
        return await streamed(await start(engine, "chat", {**CHAT, "stream": True}))

    with pytest.raises(ApiError) as caught:
        asyncio.run(ask())
    assert caught.value is FAILED
    assert engine.stream.cancelled


def test_a_failure_in_mid_stream_is_the_last_event(card: ModelCard) -> None:
    engine = GivenEngine(card, PIECES[:1], FAILED)

    async def ask() -> bytes:
        return await streamed(await start(engine, "completion", {"prompt": "Hi", "stream": True}))

    first, last = decoded(asyncio.run(ask()))
    assert json.loads(first)["choices"][0]["text"] == "H\u20ac\u2028"
    assert json.loads(last) == FAILED.to_openai()
    assert engine.stream.cancelled


def test_a_failed_document_is_raised(card: ModelCard) -> None:
    engine = GivenEngine(card, PIECES[:1], FAILED)

    async def ask() -> dict[str, Any]:
        return await (await start(engine, "chat", CHAT)).document()

    with pytest.raises(ApiError) as caught:
        asyncio.run(ask())
    assert caught.value is FAILED


@pytest.mark.parametrize("shape", ["events", "chunks"])
def test_a_client_that_goes_away_frees_what_it_held(card: ModelCard, shape: str) -> None:
    engine = GivenEngine(card, PIECES)

    async def ask() -> None:
        reply = await start(engine, "chat", {**CHAT, "stream": True})
        parts: AsyncGenerator[Any, None] = getattr(reply, shape)()
        async with aclosing(parts):
            await anext(parts)
            assert not engine.stream.cancelled
        assert engine.stream.cancelled

    asyncio.run(ask())


def test_a_document_that_nobody_waits_for_frees_what_it_held(card: ModelCard) -> None:
    engine = GivenEngine(card, PIECES * 1000)

    async def ask() -> None:
        reply = await start(engine, "chat", CHAT)
        task = asyncio.create_task(reply.document())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    assert engine.stream.cancelled


def test_a_template_does_not_hold_up_the_loop(card: ModelCard) -> None:
    threads = []

    def render(template: str, variables: Mapping[str, Any]) -> str:
        threads.append(threading.current_thread())
        return "prompt"

    async def ask() -> None:
        await OpenAI(GivenEngine(card), render).start("chat", CHAT, 1)

    asyncio.run(ask())
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"prompt": "x", "model": 5}, 400, "model"),
        ({"prompt": "x", "model": ""}, 404, "model"),
        ({"prompt": "x", "model": "m" * 1_000_000}, 400, "model"),
        ({"prompt": "x", "model": "\ud800"}, 400, "model"),
        ({"prompt": 5}, 400, "prompt"),
        ([], 400, None),
        ("x", 400, None),
        (None, 400, None),
    ],
)
def test_nothing_wrong_is_submitted(
    card: ModelCard, body: object, status: int, param: str | None
) -> None:
    engine = GivenEngine(card)
    with pytest.raises(ApiError) as caught:
        asyncio.run(start(engine, "completion", body))
    assert (caught.value.status, caught.value.param) == (status, param)
    assert engine.submitted == []


def test_models(card: ModelCard) -> None:
    page = SyncPage[Model].model_validate(models({"demo": card, "never-started": None}))
    assert page.object == "list"
    read, other = page.data
    assert (other.id, other.object) == ("never-started", "model")
    assert read == Model.model_validate(model(card), strict=True)
    assert (read.id, read.created, read.owned_by) == ("demo", card.created, "coldframe")
