"""A real uvicorn with the gateway's protocol, and clients that write what bytes they like."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from coldframe.runtime.gateway.limits import HttpLimits
from coldframe.runtime.gateway.protocol import http_protocol

PATIENT = HttpLimits(linger_s=0.3, connections=200)
"""Nothing ends early, however busy the machine is."""

QUICK = HttpLimits(head_s=0.4, keep_alive_s=0.8, write_s=0.4, linger_s=0.3, connections=200)
"""Short enough for tests that wait for the end."""


class Records(logging.Handler):
    """Everything that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record)

    @property
    def bad(self) -> list[str]:
        """Tracebacks, and what nobody expected."""
        return [
            record.getMessage()
            for record in self.found
            if record.exc_info or record.levelno >= logging.ERROR
        ]


@dataclass
class Served:
    """A server that runs."""

    port: int
    server: uvicorn.Server
    records: Records
    loop: asyncio.AbstractEventLoop | None = None
    clients: list[socket.socket] = field(default_factory=list)

    def connect(self, *, receive_buffer: int = 0) -> socket.socket:
        sock = socket.socket()
        self.clients.append(sock)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", self.port))
        return sock

    def ask(self, raw: bytes) -> bytes:
        """Sends some bytes, and reads until the server closes."""
        sock = self.connect()
        with suppress(OSError):
            sock.sendall(raw)
        return read_all(sock)


@contextmanager
def serving(app: Any, limits: HttpLimits = PATIENT, **config: Any) -> Iterator[Served]:
    """Runs an ASGI application in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(
        app,
        loop="asyncio",
        http=http_protocol(limits),
        ws="none",
        log_config=None,
        lifespan="off",
        access_log=False,
        timeout_graceful_shutdown=2,
        **config,
    )
    server = uvicorn.Server(settings)
    records = Records()
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(records)
    served = Served(listener.getsockname()[1], server, records)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield served
    finally:
        for client in served.clients:
            client.close()
        server.should_exit = True
        thread.join(20)
        for logger in loggers:
            logger.removeHandler(records)
    assert not thread.is_alive()
    assert server.server_state.connections == set()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something that is to happen soon."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def read_all(sock: socket.socket) -> bytes:
    """All that comes until the other side ends its stream; an error there is a failure here."""
    found = bytearray()
    while part := sock.recv(1 << 16):
        found += part
    return bytes(found)


def read_answer(sock: socket.socket) -> bytes:
    """One answer with a Content-Length, of a connection that goes on."""
    found = bytearray()
    while b"\r\n\r\n" not in found:
        found += _more(sock)
    head, _, body = bytes(found).partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += _more(sock)
    return head + b"\r\n\r\n" + body


def _more(sock: socket.socket) -> bytes:
    part = sock.recv(1 << 16)
    assert part, "the server closed"
    return part


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer[9:12])


def error_of(answer: bytes) -> dict[str, Any]:
    """The error of an answer, which must have OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower()
    assert f"content-length: {len(body)}".encode() in head.lower()
    document = json.loads(body)
    assert set(document) == {"error"}
    assert {"message", "type", "param", "code"} <= set(document["error"])
    error: dict[str, Any] = document["error"]
    return error


async def answer(send: Any, status: int, body: bytes, kind: bytes = b"text/plain") -> None:
    """A whole answer of an ASGI application."""
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def whole_body(receive: Any) -> bytes | None:
    """A request's body; None where the client went."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part: bytes = message["body"]
        body += part
        if not message["more_body"]:
            return body
