"""uvicorn's HTTP/1.1, for a port that is open to anybody.

uvicorn expects a proxy in front that has patience with slow clients and none with bad ones. On
most serverless platforms there is one, but whoever gets at the port talks to the gateway itself.
So here every connection has a deadline in every state (uvicorn starts no timer for one that has
sent nothing or half a head, and waits for ever for one that does not read its answer), and whatever
is refused gets an answer in JSON that it can read.

    state                               deadline            then
    nothing or half a head              head_s              408, or silence where nothing came
    a body                              bodies.read_json    408
    an answer that is not taken         write_s             dropped; the application sees it gone
    idle between two requests           keep_alive_s        closed
    refused, and still sending          linger_s            closed
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.heads import Refusal, StrictConnection
from coldframe.runtime.gateway.limits import HttpLimits, connection_limit
from coldframe.runtime.gateway.linger import LingeringTransport
from coldframe.runtime.gateway.shape import Shape, openai_shape, raw_answer
from coldframe.runtime.gateway.tcp import prepare, unacknowledged

__all__ = ["GatewayProtocol", "HttpLimits", "connection_limit", "http_protocol"]

_OVERFLOW = 32
"""Connections beyond the limit that are told so, if that is for as many; others are only closed."""
_AHEAD = 64 << 10
"""Bytes that a client may send ahead before its next answer; then it is not heard until that."""
_READ = 64 << 10
"""Bytes that are parsed before others get their turn."""

_WORDS = {
    400: "This is not a valid HTTP/1.1 request.",
    431: "The headers are too large.",
    501: "This transfer encoding is not known here.",
}


def http_protocol(limits: HttpLimits, shape: Shape = openai_shape) -> type[GatewayProtocol]:
    """The class that `uvicorn.Config(http=...)` takes.

    Args:
        shape: Of an error.
        limits: Ours. `timeout_keep_alive`, `h11_max_incomplete_event_size`, `limit_concurrency` and
            `ws` of uvicorn's own configuration have no effect any more.
    """
    made = {"limits": limits, "shape": staticmethod(shape)}
    return type("GatewayProtocol", (GatewayProtocol,), made)


class GatewayProtocol(H11Protocol):
    """One connection."""

    limits = HttpLimits()
    shape = staticmethod(openai_shape)

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: StrictConnection = StrictConnection(self.limits)
        self.timeout_keep_alive = self.limits.keep_alive_s  # type: ignore[assignment]
        self.limit_concurrency = None
        self._refused = False
        self._ahead = 0
        self._forgotten = 0
        self._head_timer = _Timer(self.loop, self.limits.head_s, self._head_is_late)
        self._write_timer = _Timer(self.loop, self.limits.write_s, self._write_is_late)
        self._unsent = 0

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transport: LingeringTransport = LingeringTransport(
            transport, self._still_sending, self.limits.linger_s
        )
        # "Paused" means from now on: the kernel has room for nothing more. That is when the clock
        # of a client that does not read must start, and also when there is little to send.
        transport.set_write_buffer_limits(high=0)
        if hasattr(transport, "max_size"):  # asyncio's own
            transport.max_size = _READ
        self._socket: socket.socket = transport.get_extra_info("socket")
        prepare(self._socket, self.limits.write_s)
        over = len(self.connections) - self.limits.connections
        if over > min(_OVERFLOW, self.limits.connections):
            transport.abort()
        elif over > 0:
            self._refuse(503, "There are too many connections.", kind="server_error")
        else:
            self._head_timer.start()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            self._forgotten += len(data)
            if self._forgotten > self.limits.linger_bytes:
                self.transport.abort()
            return
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # it said that nothing more would come (RFC 9112, 9.6)
        if self._quiet():
            data = data.lstrip(b"\r\n")  # empty lines before a request (RFC 9112, 2.2)
            if not data:
                return
        self._ahead += len(data)
        super().data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self._on_the_way()
        self._write_timer.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._write_timer.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer.stop()
        self._write_timer.stop()
        self._unset_keepalive_if_required()
        self.transport.lost()
        super().connection_lost(exc)

    # What uvicorn calls

    def handle_events(self) -> None:
        super().handle_events()
        if self.transport.is_closing():
            return
        if self.conn.their_state is not h11.IDLE:
            self._head_timer.stop()
            if self.flow.read_paused and self._ahead < _AHEAD:
                # uvicorn stops reading at the first byte of a second request. Then the end of the
                # connection is not seen either, and the first is computed for nobody.
                self.flow.resume_reading()
        elif not self._quiet():
            self._head_timer.start()

    def on_response_complete(self) -> None:
        self._ahead = 0
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        error = sys.exc_info()[1]  # uvicorn calls this where it caught it, and does not pass it on
        status = getattr(error, "error_status_hint", 400)
        words = str(error) if isinstance(error, Refusal) else _WORDS.get(status, _WORDS[400])
        self._refuse(status, words)

    def _should_upgrade(self) -> bool:
        return False

    def shutdown(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()
            return
        self.conn.closing = True
        super().shutdown()

    # Ours

    def _refuse(self, status: int, words: str, *, kind: str = "invalid_request_error") -> None:
        """Answers past the application, and ends the connection."""
        started = False
        if self.cycle is not None and not self.cycle.response_complete:
            # The body of a request that is being answered went wrong.
            started = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not started:
            error = ApiError(status, words, kind=kind)
            status, headers, body = raw_answer(error, self.shape)
            self.transport.write(_head(status, headers) + body)
        self._head_timer.stop()
        self._refused = True
        self.transport.close()

    def _quiet(self) -> bool:
        """Whether the connection is between two requests, and nothing of the next has come."""
        return self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _still_sending(self) -> bool:
        if self._refused:
            return True
        whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        return not (whole or self._quiet())

    def _head_is_late(self) -> None:
        if self._quiet():
            # Opened in advance by a proxy or a browser. It would take a 408 for the answer to
            # the request that it sends just now; a connection that ends makes it try another.
            self.transport.close()
        else:
            self._refuse(408, "The request did not come in time.")

    def _on_the_way(self) -> int:
        """Bytes that the client has not acknowledged; most of them lie with the kernel, which says
        that there is room for more only when a third of its megabytes are gone."""
        return self.transport.get_write_buffer_size() + unacknowledged(self._socket)

    def _write_is_late(self) -> None:
        left = self._on_the_way()
        if self._unsent - left < self.limits.rate * self.limits.write_s:
            self.transport.abort()
        else:
            self._unsent = left
            self._write_timer.start()


class _Timer:
    """Calls back once, unless it is stopped; one that runs is not started anew."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, seconds: float, then: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._seconds = seconds
        self._then = then
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = self._loop.call_later(self._seconds, self._late)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _late(self) -> None:
        self._handle = None
        self._then()


def _head(status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
    lines += [name + b": " + value for name, value in [*headers, (b"connection", b"close")]]
    return b"\r\n".join(lines) + b"\r\n\r\n"
