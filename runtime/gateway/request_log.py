"""One line of the log for each request, and the id that it is found by.

It stands outermost. What the application raised comes no further than this: the client gets an
answer where none has begun, the log a traceback, and uvicorn nothing to say about it.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.gone import ClientGone
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.gateway.shape import Shape, openai_shape, raw_answer

__all__ = ["Notes", "RequestLog", "notes_of", "request_id_of"]

_KEY = "coldframe.notes"
_SANE = re.compile(rb"[A-Za-z0-9_.-]{1,128}")
_FAILED = 500
_GONE = 499
"""nginx's word for a client that went; nobody gets it."""
_LONGEST_PATH = 256
_LONGEST_WORDS = 200


@dataclass(slots=True)
class Notes:
    """What is known of a request, for its line; routes add to it.

    Attributes:
        request_id: The client's own, or one of ours.
        model: The model's name.
        prompt_tokens: Of all its prompts.
        completion_tokens: Of all its answers.
        ttft_s: Seconds until the first token; where no route says it, until the first bytes of an
            answer that comes in parts.
        status: Of the answer, once it has begun.
        gone: Whether the client went before the end.
    """

    request_id: str
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    status: int | None = None
    gone: bool = False


def notes_of(scope: Any) -> Notes:
    """The notes of the request that an ASGI scope is about."""
    notes = scope.get(_KEY)
    return notes if isinstance(notes, Notes) else Notes(request_id_of(scope))


def request_id_of(scope: Any) -> str:
    """What the client calls its request, where that can be put into a log; else a new id."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE.fullmatch(value):
            return str(value, "ascii")
    return f"req-{os.urandom(12).hex()}"


class RequestLog:
    """ASGI middleware.

    Args:
        app: The application.
        log: Where the lines go.
        quiet: Paths of probes: each replica is asked every few seconds, and nobody wants to read
            it, unless it is not well. Logged as `debug`.
        shape: Of an error.
    """

    def __init__(
        self, app: Any, log: Log, quiet: Collection[str] = (), shape: Shape = openai_shape
    ) -> None:
        self._app = app
        self._shape = shape
        self._log = log
        self._quiet = frozenset(quiet)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        notes = Notes(request_id_of(scope))
        scope[_KEY] = notes
        started = time.monotonic()

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                notes.status = message["status"]
                notes.gone = notes.status == _GONE
                headers = [
                    *message.get("headers", ()),
                    (b"x-request-id", notes.request_id.encode()),
                ]
                message = {**message, "headers": headers}
            elif notes.ttft_s is None and message.get("more_body") and message.get("body"):
                notes.ttft_s = time.monotonic() - started
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            # Only a server that ends does this; the task is over in any case.
            if notes.status is None:
                error = ApiError(
                    503,
                    "The server is ending. Try again.",
                    kind="server_error",
                    code="shutting_down",
                    retry_after_s=1.0,
                )
                await self._answer(noting, error, scope)
        except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on
            # Starlette wraps what is raised once an answer has begun.
            if isinstance(error, ClientGone) or isinstance(error.__cause__, ClientGone):
                notes.gone = True
                if notes.status == _FAILED:
                    notes.status = None  # what Starlette answers whatever is raised; nobody got it
                return
            # An error's own words may repeat what the client sent: the beginning must do.
            frames = "".join(traceback.format_tb(error.__traceback__))
            trace = f"{frames}{type(error).__name__}: {str(error)[:_LONGEST_WORDS]}"
            self._log.error("request failed", request_id=notes.request_id, traceback=trace)
            if notes.status is None:
                failure = ApiError(
                    500,
                    "Something went wrong here, not in the request.",
                    kind="server_error",
                    code="internal_error",
                )
                await self._answer(noting, failure, scope)
        finally:
            self._line(scope, notes, time.monotonic() - started)

    async def _answer(self, send: Any, error: ApiError, scope: Any) -> None:
        status, headers, body = raw_answer(error, self._shape, scope["path"])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _line(self, scope: Any, notes: Notes, seconds: float) -> None:
        well = notes.status is not None and notes.status < 400
        level = "debug" if well and scope["path"] in self._quiet else "info"
        self._log.write(
            level,
            "request",
            {
                "request_id": notes.request_id,
                "method": scope["method"],
                "path": scope["path"][:_LONGEST_PATH],
                "status": notes.status,
                "seconds": seconds,
                "ttft": notes.ttft_s,
                "model": notes.model,
                "prompt_tokens": notes.prompt_tokens,
                "completion_tokens": notes.completion_tokens,
                "client_gone": notes.gone or None,
            },
        )
