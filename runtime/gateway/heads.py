"""Requests that are refused for their head alone, before any part of the application sees them.

h11 checks the syntax of HTTP/1.1. What it lets through and a gateway must not, stands here: heads
that are too large, requests whose end two servers can see in two places (smuggling), chunks so
small that parsing them costs more than sending them, and protocols that are not spoken here.
"""

from __future__ import annotations

import h11

from coldframe.runtime.gateway.limits import HttpLimits

__all__ = ["Refusal", "StrictConnection"]

_FEW_CHUNKS = 256
_SMALL_CHUNK = 64


class Refusal(h11.RemoteProtocolError):
    """What is wrong with a request, in words of ours: h11's own repeat what the client sent."""


class StrictConnection(h11.Connection):
    """h11's side of a server, with our limits.

    Args:
        limits: Ours.
    """

    def __init__(self, limits: HttpLimits) -> None:
        super().__init__(h11.SERVER, limits.head_bytes)
        self._limits = limits
        self._chunks = 0
        self._chunk_bytes = 0
        self.closing = False
        """Whether answers from now on say that the connection ends with them."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._chunk_bytes = 0
            _check_head(event, self._limits)
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._chunk_bytes += len(event.data)
            # One byte a chunk costs 15 us each: a stream of 1 MB/s would keep the server busy.
            if self._chunks > max(_FEW_CHUNKS, self._chunk_bytes // _SMALL_CHUNK):
                raise Refusal("The body's chunks are too small.", error_status_hint=400)
        return event

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        if isinstance(event, h11.Response) and (self.closing or self.their_state is h11.SEND_BODY):
            # The rest of a body that nobody wants is not waited for.
            event = h11.Response(
                status_code=event.status_code,
                headers=[*event.headers.raw_items(), (b"connection", b"close")],
                reason=event.reason,
            )
        return super().send(event)


def _check_head(request: h11.Request, limits: HttpLimits) -> None:
    if len(request.target) > limits.target_bytes:
        raise Refusal("The URL is too long.", error_status_hint=414)
    if len(request.headers) > limits.headers:
        raise Refusal("There are too many headers.", error_status_hint=431)
    # A head that comes in one piece is not an incomplete event, which is all that h11 limits.
    size = sum(len(name) + len(value) + 4 for name, value in request.headers)
    if size + len(request.target) > limits.head_bytes:
        raise Refusal("The headers are too large.", error_status_hint=431)
    if not request.target.startswith(b"/") and request.target != b"*":
        raise Refusal("Only paths of this server can be asked for.", error_status_hint=400)
    if request.http_version not in (b"1.1", b"1.0"):
        raise Refusal("HTTP/1.1 is spoken here.", error_status_hint=505)
    names = [name for name, _ in request.headers]
    if b"transfer-encoding" in names and (
        b"content-length" in names or request.http_version == b"1.0"
    ):
        raise Refusal("It is not clear where this request ends.", error_status_hint=400)
    for name, value in request.headers:
        # h2c is offered by clients that go on with HTTP/1.1 where nobody takes it up.
        if name == b"upgrade" and b"websocket" in value.lower():
            raise Refusal(
                "There are no WebSockets here. Stream with server-sent events (`stream`: true).",
                error_status_hint=400,
            )
