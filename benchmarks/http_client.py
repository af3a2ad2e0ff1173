"""A thin HTTP client with a clock: nothing between the socket and the time that is taken.

Two kinds of request, both for a completion. A cold one knocks until somebody listens, as whatever
routes requests to a container does. A warm one goes over a connection that stays open.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from coldframe.benchmarks.traffic.streams import unchunked
from coldframe.loader.errors import PlatformError

__all__ = ["FIRST_ID", "Answer", "Connection", "completion", "knock", "token_ids"]

FIRST_ID = 5
"""Ids below it may mean something of their own in a vocabulary: padding, a beginning, an end."""

_KNOCK_S = 0.001
"""Between two knocks: as exact as is needed, and no core is kept busy by it."""
_BLANK_LINE = b"\r\n\r\n"
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_EVENT = b"data: {"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, and when its parts came (CLOCK_MONOTONIC).

    Args:
        sent_ns: When its request was handed to the kernel.
        first_ns: When its first token was there: the first event of a stream, else all of it.
        last_ns: When it was over.
        headers: By their names in lower case.
        body: As it came, in chunks where it was sent in such.
    """

    sent_ns: int
    first_ns: int
    last_ns: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def seconds(self) -> float:
        """From the request's first byte to the answer's last."""
        return (self.last_ns - self.sent_ns) / 1e9


def completion(
    model: str, prompt: list[int], tokens: int, *, stream: bool, ids: bool = False
) -> bytes:
    """The body of a request for so many tokens, as coldframe and vLLM understand it.

    Args:
        model: As the server calls it.
        prompt: Token ids.
        tokens: How many, whatever they are.
        stream: Whether they come one by one.
        ids: Whether their ids come, too (`token_ids`).
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": stream,
    }
    if ids:
        body["return_token_ids"] = True
    return json.dumps(body).encode()


def token_ids(answer: Answer) -> list[int]:
    """The ids of a streamed completion that was asked for with them.

    Raises:
        PlatformError: The stream has an error in it, or does not end as one should.
    """
    body = answer.body
    if answer.headers.get("transfer-encoding") == "chunked":
        body, _ = unchunked(body, 0)
    found: list[int] = []
    for line in body.decode().splitlines():
        said = line.removeprefix("data: ")
        if said == line:
            continue
        if said == "[DONE]":
            return found
        event = json.loads(said)
        if "error" in event or "choices" not in event:
            got = event.get("error", said[:300])
            raise PlatformError("a request was refused in mid-stream", got=got)
        for choice in event["choices"]:
            found += choice.get("token_ids") or ()
    raise PlatformError("a stream has no end", got=body[-300:].decode(errors="replace"))


def knock(port: int, deadline_ns: int) -> socket.socket:
    """Tries to connect again and again, until it is taken.

    Args:
        port: On loopback.
        deadline_ns: When to give up (CLOCK_MONOTONIC).

    Raises:
        PlatformError: Nobody listened in time.
    """
    while True:
        sock = socket.socket()
        try:
            sock.connect(("127.0.0.1", port))
        except OSError as error:
            sock.close()
            if time.monotonic_ns() > deadline_ns:
                raise PlatformError(
                    "nobody listens", where=f"port {port}", got=error.strerror or str(error)
                ) from error
            time.sleep(_KNOCK_S)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock


class Connection:
    """A connection that is kept open from request to request.

    Args:
        sock: Connected already.
        wait_s: How long the next part of an answer may take.
        quick_ack: Whether what comes is acknowledged at once. Else the kernel does so 40 ms later
            on a connection that was idle, and a server that waits for that (Nagle's algorithm)
            holds back the second of two small packets.
    """

    def __init__(self, sock: socket.socket, wait_s: float, *, quick_ack: bool = False) -> None:
        self._sock = sock
        self._quick_ack = quick_ack
        sock.settimeout(wait_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._sock.close()

    def post(self, path: str, body: bytes) -> Answer:
        """Sends a request and reads all of its answer.

        Raises:
            PlatformError: The answer is not 200, or does not end.
        """
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return self._exchange(head.encode() + body)

    def get(self, path: str) -> Answer:
        """As `post`, without a body."""
        return self._exchange(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())

    def _exchange(self, request: bytes) -> Answer:
        sent_ns = time.monotonic_ns()
        received = bytearray()
        try:
            self._sock.sendall(request)
            return self._answer(sent_ns, received)
        except OSError as error:
            raise PlatformError(
                "an answer broke off", got=f"{error}, after {bytes(received[-300:])!r}"
            ) from error

    def _answer(self, sent_ns: int, received: bytearray) -> Answer:
        while (end := received.find(_BLANK_LINE)) < 0:
            self._receive(received)
        status, headers = _head(bytes(received[:end]))
        start = end + len(_BLANK_LINE)
        first_ns = None
        length = int(headers["content-length"]) if "content-length" in headers else None
        while True:
            if first_ns is None and received.find(_EVENT, start) >= 0:
                first_ns = time.monotonic_ns()
            # An event has no CR in it, so this can only be the end. The body's first chunk may be
            # its last; the CR before it is the head's then.
            whole = (
                received.endswith(_LAST_CHUNK, start - 2)
                if length is None
                else len(received) >= start + length
            )
            if whole:
                break
            self._receive(received)
        last_ns = time.monotonic_ns()
        body = bytes(received[start:])
        if status != 200:
            raise PlatformError("a request was refused", got=f"{status} {body[:300]!r}")
        return Answer(sent_ns, first_ns or last_ns, last_ns, headers, body)

    def _receive(self, received: bytearray) -> None:
        if self._quick_ack:  # the kernel forgets that again and again
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        part = self._sock.recv(1 << 16)
        if not part:
            raise ConnectionError("the connection was closed")
        received += part


def _head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}
