"""An open-loop client: each request is sent when it is due, whether or not others are answered.

While a load runs, bytes are only stamped with the time at which they came; what they say is read
when it is over (`streams`). So a client costs the machine that it shares with the server little,
and what it costs shows: each request's *lateness* is how long after its time it was sent, and
whatever holds up the sending holds up the stamps by as much.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from coldframe.benchmarks.traffic.arrivals import Ask
from coldframe.benchmarks.traffic.streams import Stamped, read_stream

__all__ = ["Record", "offer", "play", "request_bytes"]

_LEAD_S = 0.05
"""Before the first request is due, so that all is set up by then."""
_PREFERRED = 10
_AHEAD_S = 1.0
"""So long before it is due a request that is not there yet is made."""


@dataclass(slots=True)
class Record:
    """What became of a request; all moments in seconds since the load's start.

    Args:
        due_s: When it was to be sent.
        prompt_tokens: Of its prompt.
        asked: Tokens that it asked for.
        sent_s: When it was sent.
        token_s: When each part of the answer with text in it came. That is each token, but for
            those that only together with the next one are a character.
        end_s: When the answer's end came; None where it never did.
        tokens: Tokens of the answer, as the server counts them.
        status: Of HTTP; None where there was no answer.
        error: What went wrong.
        first_s: When the first event with a token came, be there text of it yet or not.
    """

    due_s: float
    prompt_tokens: int
    asked: int
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    end_s: float | None = None
    tokens: int = 0
    status: int | None = None
    error: str | None = None
    first_s: float | None = None

    @property
    def whole(self) -> bool:
        """Whether the answer ended well, and has as many tokens as were asked for."""
        return self.end_s is not None and self.error is None and self.tokens == self.asked

    @property
    def answered(self) -> bool:
        """Whether the answer is whole, and there is text in it."""
        return self.whole and bool(self.token_s)


def request_bytes(model: str, ask: Ask) -> bytes:
    """The request as it goes over a connection of its own."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ask.prompt),
        "max_tokens": ask.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def offer(port: int, model: str, asks: Sequence[Ask], limit_s: float) -> list[Record]:
    """Sends a load, and returns what became of each request, in their order.

    Args:
        port: Of a server on loopback.
        model: What it calls its model.
        asks: The load.
        limit_s: How long an answer may take; one that takes longer has failed.
    """
    requests = [request_bytes(model, ask) for ask in asks]
    with _undisturbed():
        start = time.monotonic() + _LEAD_S
        return play(port, asks, requests.__getitem__, limit_s, start)


def play(
    port: int,
    asks: Sequence[Ask],
    request: Callable[[int], bytes],
    limit_s: float,
    start: float,
    sent: Callable[[int], None] = lambda number: None,
    lost: Callable[[], None] = lambda: None,
) -> list[Record]:
    """As `offer`, of one model or several, from a moment on.

    Args:
        port: Of a server on loopback.
        asks: The load.
        request: Makes the bytes of the one of that number.
        limit_s: How long an answer may take.
        start: When the load begins, by CLOCK_MONOTONIC.
        sent: Called with the number of each that goes out.
        lost: Called where no connection could be made; what it raises ends the load.
    """
    return asyncio.run(_play(port, asks, request, limit_s, start, sent, lost))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever is due goes first: the client stands for other machines than the server's.

    A collection would hold it up, and where the kernel lets it, it is preferred to the server, of
    whose cores it takes next to nothing.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, before - _PREFERRED)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        os.setpriority(os.PRIO_PROCESS, 0, before)


async def _play(
    port: int,
    asks: Sequence[Ask],
    request: Callable[[int], bytes],
    limit_s: float,
    start: float,
    sent: Callable[[int], None],
    lost: Callable[[], None],
) -> list[Record]:
    async def one(number: int, due: float) -> _Sending:
        await asyncio.sleep(max(0.0, due - _AHEAD_S - time.monotonic()))
        data = request(number)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        sent(number)
        return await _send(port, data, limit_s, lost)

    each = (one(number, start + ask.due_s) for number, ask in enumerate(asks))
    return [
        _record(ask, start, sending)
        for ask, sending in zip(asks, await asyncio.gather(*each), strict=True)
    ]


@dataclass(slots=True)
class _Sending:
    """A request that was sent at a time of CLOCK_MONOTONIC, and why nothing more came, if so."""

    sent: float
    stamped: Stamped
    why: str | None = None


async def _send(port: int, request: bytes, limit_s: float, lost: Callable[[], None]) -> _Sending:
    sending = _Sending(time.monotonic(), Stamped())
    try:
        async with asyncio.timeout(limit_s):
            loop = asyncio.get_running_loop()
            over = loop.create_future()
            await loop.create_connection(
                lambda: _Connection(request, sending.stamped, over), "127.0.0.1", port
            )
            await over
    except TimeoutError:
        sending.why = f"not over after {limit_s:g} s"
    except OSError as error:
        sending.why = error.strerror or str(error)
        lost()
    return sending


def _record(ask: Ask, start: float, sending: _Sending) -> Record:
    found = read_stream(sending.stamped)
    end_s = None if found.end_at is None else found.end_at - start
    error = found.error
    if end_s is None and error is None:
        error = sending.why or "the answer broke off"
    return Record(
        ask.due_s,
        len(ask.prompt),
        ask.tokens,
        sending.sent - start,
        [moment - start for moment in found.text_at],
        end_s,
        found.tokens,
        found.status,
        error,
        None if found.first_at is None else found.first_at - start,
    )


class _Connection(asyncio.Protocol):
    """Sends one request, and stamps what comes until the other side is through."""

    def __init__(self, request: bytes, stamped: Stamped, over: asyncio.Future[None]) -> None:
        self._request = request
        self._stamped = stamped
        self._over = over

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._over.add_done_callback(lambda _: transport.abort())  # also where time is up
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._stamped.add(time.monotonic(), data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._over.done():
            self._over.set_result(None)
