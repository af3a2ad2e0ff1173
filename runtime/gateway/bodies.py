"""A request's body: its bytes within limits of size and time, then its JSON."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from typing import Any, Protocol

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.gone import ClientGone, Receive
from coldframe.runtime.gateway.strict_json import parse

__all__ = ["BodyBudget", "Incoming", "read_body", "read_json"]

_THREAD_BYTES = 1 << 20
"""Above it a body is parsed in a thread (8 MiB take 5 to 100 ms)."""
_RETRY_S = 1.0

_JSON = re.compile(r"application/(?:[\w.+-]+\+)?json")
_UNSAID = {"application/x-www-form-urlencoded", "text/plain", "application/octet-stream"}
"""What clients say that were not told to say anything, curl and boto3 among them."""


class Incoming(Protocol):
    """A request as ASGI gives it; Starlette's is one."""

    @property
    def scope(self) -> Any: ...

    @property
    def receive(self) -> Receive: ...


class BodyBudget:
    """What all bodies that are being read may hold together.

    A thousand slow clients with half a body each are bounded by this; what waits to be computed is
    bounded elsewhere.

    Args:
        total: Bytes.
    """

    def __init__(self, total: int = 256 << 20) -> None:
        self.total = total
        self.held = 0
        self.parsing = asyncio.Semaphore(1)
        """One large body after the other: parsed, they are larger still."""

    def take(self, count: int) -> None:
        """Takes some bytes.

        Raises:
            ApiError: There is no room for them (503).
        """
        if self.held + count > self.total:
            raise ApiError(
                503,
                "Too many large requests are being received. Try again in a moment.",
                kind="server_error",
                code="overloaded",
                retry_after_s=_RETRY_S,
            )
        self.held += count

    def give_back(self, count: int) -> None:
        self.held -= count


async def read_json(
    request: Incoming,
    *,
    limit: int,
    timeout_s: float,
    stall_s: float = 10.0,
    rate: int = 16 << 10,
    budget: BodyBudget | None = None,
) -> tuple[Any, int]:
    """The JSON value in a request's body, and the body's size in bytes.

    A body need not say that it is JSON where it says nothing else: curl calls everything a form.
    But what a web page sends must. The types that a page may send to another origin without being
    allowed to (a form, plain text) are how any page that somebody visits could use a server on
    that visitor's own machine. Browsers send `Origin`, curl does not.

    Args:
        request: Nothing of its body has been read.
        limit: Bytes, at most.
        timeout_s: For the whole body, beyond what `rate` gives it.
        stall_s: Between two parts of it.
        rate: Bytes per second that extend the time; a client that is always slower is too slow.
        budget: Shared by all requests.

    Raises:
        ApiError: It is none that can be taken (400, 408, 413, 415, 503).
        ClientGone: The client went before it was all there.
    """
    headers = _headers(request.scope)
    _check_type(headers)
    budget = budget or BodyBudget(limit)
    held = _Held(budget)
    try:
        raw = await _read(request.receive, headers, limit, timeout_s, stall_s, rate, held)
        size = len(raw)
        if size <= _THREAD_BYTES:
            return parse(raw), size
        async with budget.parsing:
            return await asyncio.to_thread(parse, raw), size
    finally:
        held.give_back()


async def read_body(
    request: Incoming,
    *,
    limit: int,
    timeout_s: float,
    stall_s: float = 10.0,
    rate: int = 16 << 10,
    budget: BodyBudget | None = None,
) -> bytes:
    """The bytes of a request's body, whatever they are; otherwise as `read_json`."""
    held = _Held(budget or BodyBudget(limit))
    try:
        headers = _headers(request.scope)
        return await _read(request.receive, headers, limit, timeout_s, stall_s, rate, held)
    finally:
        held.give_back()


class _Held:
    """One body's part of the budget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._count = 0

    def take(self, count: int) -> None:
        self._budget.take(count)
        self._count += count

    def give_back(self) -> None:
        self._budget.give_back(self._count)
        self._count = 0


async def _read(
    receive: Receive,
    headers: Mapping[str, str],
    limit: int,
    timeout_s: float,
    stall_s: float,
    rate: int,
    held: _Held,
) -> bytes:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, "Compressed bodies are not taken. Send it as it is.")
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    # What a client promises costs nothing; what it has sent does.
    parts = bytearray()
    start = time.monotonic()
    while True:
        left = start + timeout_s + len(parts) / rate - time.monotonic()
        try:
            async with asyncio.timeout(min(stall_s, left)):
                message = await receive()
        except TimeoutError:
            raise ApiError(408, "The body did not come in time.", code="request_timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        if len(parts) + len(part) > limit:
            raise _too_large(limit)
        held.take(len(part))
        parts += part
        if not message.get("more_body", False):
            return bytes(parts)


def _check_type(headers: Mapping[str, str]) -> None:
    kind, *parameters = headers.get("content-type", "").lower().split(";")
    kind = kind.strip()
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        charset = value.strip().strip('"')
        if name.strip() == "charset" and charset not in ("utf-8", "utf8", "us-ascii"):
            raise ApiError(415, "JSON is UTF-8; other character sets are not taken.")
    if not kind or _JSON.fullmatch(kind) or (kind in _UNSAID and "origin" not in headers):
        return
    raise ApiError(415, "Send JSON, with `Content-Type: application/json`.")


def _headers(scope: Any) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")
