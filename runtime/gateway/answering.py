"""From a request on a route to its answer: read, asked, shaped, sent.

The same for OpenAI's routes and those of the platforms; what differs is an adapter. An answer's
status is sent with its first token, so that whatever fails before that has a status of its own.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.bodies import BodyBudget, read_json
from coldframe.runtime.gateway.exchange import CURRENT
from coldframe.runtime.gateway.gone import send_stream, until_gone
from coldframe.runtime.gateway.limits import HttpLimits
from coldframe.runtime.gateway.metrics import Metrics
from coldframe.runtime.gateway.openai.requests import MAX_SEQUENCES
from coldframe.runtime.gateway.openai.service import OpenAI, Reply
from coldframe.runtime.gateway.platforms.base import Adapter, Requests

__all__ = ["Answering", "EventStream", "JsonResponse", "refusal"]

_RETRY_MS = 1000


class JsonResponse(Response):
    """JSON, as OpenAI's clients want it: UTF-8 and no NaN."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        # A lone surrogate in a client's own words comes back as a question mark.
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


class EventStream(Response):
    """Server-sent events, the first of which is there already.

    Args:
        first: The first one.
        rest: The others.
        headers: Beside the content type.
    """

    media_type = "text/event-stream"

    def __init__(
        self, first: bytes, rest: AsyncIterator[bytes], headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers=dict(headers), media_type=self.media_type)
        # Whose length nobody knows yet.
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_stream(send, receive, self.status_code, self.raw_headers, self._all())

    async def _all(self) -> AsyncIterator[bytes]:
        async with aclosing(self._rest):  # type: ignore[type-var]
            yield self._first
            async for event in self._rest:
                yield event


def refusal(error: ApiError, shaped: tuple[int, object] | None = None) -> JsonResponse:
    """The answer that an error is.

    Args:
        error: What went wrong.
        shaped: Its status and body in a platform's shape; OpenAI's by default.
    """
    status, body = shaped or (error.status, error.to_openai())
    headers = {}
    if error.retry_after_s is not None:
        # Whole seconds are all that HTTP knows; openai-python reads the finer one first.
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * _RETRY_MS))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JsonResponse(body, status, headers)


class Answering:
    """Answers requests for tokens.

    Args:
        openai: Who does.
        metrics: Is told of those that are refused before they come so far.
        max_body: Bytes of a body at most.
        limits: What a client has for a body.
    """

    def __init__(
        self, openai: OpenAI, metrics: Metrics, *, max_body: int, limits: HttpLimits
    ) -> None:
        self._openai = openai
        self._metrics = metrics
        self._max_body = max_body
        self._limits = limits
        self._budget = BodyBudget()

    async def openai(self, request: Request, kind: Literal["completion", "chat"]) -> Response:
        """OpenAI's own routes."""
        try:
            body, size = await self._read(request)
            reply = await until_gone(request.receive, self._openai.start(kind, body, size))
            if reply.stream:
                return await self._stream(request, reply, reply.events())
            document = await until_gone(request.receive, reply.document())
        except ApiError as error:
            self._count(error)
            return refusal(error)
        return JsonResponse(document, headers=_timing(reply))

    async def predict(self, request: Request, adapter: Adapter) -> Response:
        """A platform's route."""
        try:
            body, size = await self._read(request)
            accepts = request.headers.get("accept", "")
            wanted = adapter.read(
                body, path=request.path_params, sse=accepts == "text/event-stream"
            )
            replies = await until_gone(request.receive, self._start(wanted, size))
            if wanted.stream:
                (reply,) = replies
                return await self._stream(request, reply, _translated(adapter, wanted, reply))
            try:
                documents = asyncio.gather(*(reply.document() for reply in replies))
                answers = await until_gone(request.receive, documents)
            finally:
                for reply in replies:  # where one has failed
                    reply.cancel()
            return JsonResponse(adapter.write(wanted, answers), headers=_timing(*replies))
        except ApiError as error:
            self._count(error)
            return refusal(error, adapter.error(error))

    async def _read(self, request: Request) -> tuple[object, int]:
        limits = self._limits
        return await read_json(
            request,
            limit=self._max_body,
            timeout_s=limits.body_s,
            stall_s=limits.stall_s,
            rate=limits.rate,
            budget=self._budget,
        )

    async def _start(self, wanted: Requests, size: int) -> list[Reply]:
        replies: list[Reply] = []
        try:
            for kind, body in wanted.items:
                reply = await self._openai.start(kind, body, size // len(wanted.items))  # type: ignore[arg-type]
                replies.append(reply)
                if sum(reply.sequences for reply in replies) > MAX_SEQUENCES:
                    raise ApiError(
                        400,
                        f"a request may ask for {MAX_SEQUENCES} sequences at most",
                        code="invalid_value",
                    )
        except BaseException:
            for reply in replies:
                reply.cancel()
            raise
        return replies

    async def _stream(
        self, request: Request, reply: Reply, events: AsyncIterator[bytes]
    ) -> Response:
        try:
            first = await until_gone(request.receive, anext(events))
        except BaseException:
            reply.cancel()
            raise
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **_timing(reply)}
        return EventStream(first, events, headers)

    def _count(self, error: ApiError) -> None:
        exchange = CURRENT.get()
        model = ""
        if exchange is not None:
            exchange.failed(error)
            model = exchange.notes.model or ""
        if not error.counted:
            words = {404: "not_found", 503: str(error.code), 500: str(error.code)}
            self._metrics.refused(words.get(error.status, "bad_request"), model)


async def _translated(adapter: Adapter, wanted: Requests, reply: Reply) -> AsyncIterator[bytes]:
    """A streamed answer in a platform's frames."""
    events = adapter.events(wanted)
    begun = False
    try:
        async with aclosing(reply.chunks()) as chunks:
            async for chunk in chunks:
                frames = events.chunk(chunk)
                if frames:
                    begun = True
                    yield frames
        yield events.done()
    except ApiError as error:
        if not begun:
            raise
        yield events.failed(error)


def _timing(*replies: Reply) -> dict[str, str]:
    """What the answer waited for, in milliseconds (https://www.w3.org/TR/server-timing/)."""
    parts = []
    for name, seconds in replies[-1].timing().items() if replies else ():
        parts.append(f"{name};dur={seconds * 1000:.1f}")
    return {"server-timing": ", ".join(parts)} if parts else {}
