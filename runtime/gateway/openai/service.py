"""OpenAI's routes without HTTP: a body in, a document or server-sent events out."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from coldframe.runtime.gateway.api import ApiError, Engine, ModelCard, Stream
from coldframe.runtime.gateway.openai.answers import Chunks, Document
from coldframe.runtime.gateway.openai.prepare import (
    Kind,
    Prepared,
    Render,
    prepare_chat,
    prepare_completion,
)
from coldframe.runtime.gateway.openai.problems import check_text, invalid
from coldframe.runtime.gateway.openai.requests import MAX_NAME, as_object

__all__ = ["OpenAI", "Reply", "event", "model", "models"]

_DONE = b"data: [DONE]\n\n"


class OpenAI:
    """The API over an engine.

    Args:
        engine: Who computes.
        render: Fills in chat templates; called in a thread.
    """

    def __init__(self, engine: Engine, render: Render) -> None:
        self._engine = engine
        self._render = render

    async def start(self, kind: Kind, body: object, size: int) -> Reply:
        """Hand a request to the engine.

        Args:
            kind: `completion` or `chat`.
            body: Any JSON value.
            size: Of the body as it came, in bytes.

        Raises:
            ApiError: The request is wrong, or there is no place for it.
        """
        card = await self._engine.card(_model_name(body), size=size)
        if kind == "chat":
            prepared = await asyncio.to_thread(prepare_chat, body, card, self._render)
        else:
            prepared = prepare_completion(body, card)
        stream = self._engine.submit(card.name, prepared.generations, size=size)
        return Reply(prepared, card, stream)


class Reply:
    """An answer on its way. Take it once: whole, or as events, as the request has asked."""

    def __init__(self, prepared: Prepared, card: ModelCard, stream: Stream) -> None:
        self.card = card
        self.stream = prepared.stream
        self.sequences = len(prepared.generations)
        self._prepared = prepared
        self._pieces = stream
        prefix = "chatcmpl" if prepared.kind == "chat" else "cmpl"
        self._id = f"{prefix}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def document(self) -> dict[str, Any]:
        """The whole answer, once it is there.

        Raises:
            ApiError: It failed.
        """
        whole = Document(self._prepared, self.card, id=self._id, created=self._created)
        try:
            async for piece in self._pieces:
                whole.add(piece)
            return whole.finish()
        except BaseException:
            self.cancel()
            raise

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as OpenAI's chunks, for platforms with frames of their own.

        Who never takes the first one has to `cancel`.

        Raises:
            ApiError: It failed.
        """
        stream = Chunks(self._prepared, self.card, id=self._id, created=self._created)
        try:
            async for piece in self._pieces:
                for chunk in stream.of(piece):
                    yield chunk
        except BaseException:
            # Among them is the end of a client that has gone away.
            self.cancel()
            raise
        last = stream.last()
        if last is not None:
            yield last

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, the last of which is `[DONE]`.

        Take the first one before an HTTP status is sent: what fails before it has a status of its
        own. A failure behind it is an event, and the last one. Who never takes the first one has
        to `cancel`.

        Raises:
            ApiError: It failed before the first event.
        """
        begun = False
        # A generator that is left is not closed before it is collected, unless it is told to be.
        async with aclosing(self.chunks()) as chunks:
            try:
                async for chunk in chunks:
                    begun = True
                    yield event(chunk)
                yield _DONE
            except ApiError as error:
                if not begun:
                    raise
                yield event(error.to_openai())

    def timing(self) -> dict[str, float]:
        """What the answer has waited for so far, in seconds; see `Stream`."""
        return self._pieces.timing()

    def cancel(self) -> None:
        """Give up all that the answer holds."""
        self._pieces.cancel()


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    JSON has no line end within it, so one `data` line holds it.
    """
    return b"data: " + _encode(data).encode() + b"\n\n"


_encode = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode


def models(cards: Mapping[str, ModelCard | None]) -> dict[str, Any]:
    """The answer of GET /v1/models.

    Args:
        cards: By name; None where it is not known yet, since that model was never started.
    """
    return {"object": "list", "data": [_entry(name, card) for name, card in cards.items()]}


def model(card: ModelCard) -> dict[str, Any]:
    """The answer of GET /v1/models/{id}."""
    return _entry(card.name, card)


def _entry(name: str, card: ModelCard | None) -> dict[str, Any]:
    """A model in OpenAI's words; `max_model_len` is vLLM's name for the context."""
    entry = {
        "id": name,
        "object": "model",
        "created": 0 if card is None else card.created,
        "owned_by": "coldframe",
    }
    return entry if card is None else {**entry, "max_model_len": card.context_length}


def _model_name(body: object) -> str | None:
    name = as_object(body).get("model")
    if name is None:
        return None
    if len(check_text("model", name)) > MAX_NAME:
        raise invalid("model", f"at most {MAX_NAME} characters", name)
    return str(name)
