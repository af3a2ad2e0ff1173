"""Many clients at once at a replica that is still cold: who is answered, in what order, and when.

They come one after the other as fast as one process can send, all before the first byte of weights
has been read: so each has a place in the line. Whose first token is there before that of somebody
who came earlier has overtaken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coldframe.benchmarks.http_client import completion, knock
from coldframe.benchmarks.servers import Server, coldframe_server
from coldframe.loader.errors import PlatformError

__all__ = ["Crowd", "gather_crowd", "overtaken"]

_WAIT_S = 300.0
_TOKENS = 4
_DONE = b"data: [DONE]\n\n"

_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Crowd:
    """What came of it.

    Args:
        clients: How many there were.
        answered: How many have the whole of their answer.
        overtaken: How many first tokens came before that of a client that had asked earlier.
        all_sent_s: From the exec until the last one had asked.
        first_s: From there until the first token of all.
        last_s: Until the last token of all.
        memory: Of the endpoint's own processes when all was over; see `Server.memory`.
    """

    clients: int
    answered: int
    overtaken: int
    all_sent_s: float
    first_s: float
    last_s: float
    memory: dict[str, dict[str, float]]


def gather_crowd(model: Path, prompt: list[int], clients: int, throttle: str) -> Crowd:
    """Starts a replica, and has so many clients ask it at once.

    Args:
        model: A checkpoint's directory.
        prompt: Token ids; each client changes the first of them.
        clients: How many.
        throttle: The rate of the load.

    Raises:
        PlatformError: The replica failed.
    """
    with coldframe_server(model, f"--throttle={throttle}") as server:
        knock(server.port, time.monotonic_ns() + int(_WAIT_S * 1e9)).close()
        return asyncio.run(_gather(server, prompt, clients))


async def _gather(server: Server, prompt: list[int], clients: int) -> Crowd:
    came = [
        await _ask(server.port, completion("m", [5 + number, *prompt[1:]], _TOKENS, stream=True))
        for number in range(clients)
    ]
    all_sent_ns = time.monotonic_ns()
    async with asyncio.timeout(_WAIT_S):
        times = [time_ for time_ in await asyncio.gather(*map(_read, came)) if time_ is not None]
    if not times:
        raise PlatformError("no client of a crowd was answered")
    firsts = [first for first, _ in times]
    return Crowd(
        clients,
        len(times),
        overtaken(firsts),
        server.since_exec(all_sent_ns),
        server.since_exec(min(firsts)),
        server.since_exec(max(last for _, last in times)),
        server.memory(),
    )


def overtaken(moments: Sequence[int]) -> int:
    """How many of those moments, in the order of arrival, are before one that is earlier in it."""
    count, latest = 0, 0
    for moment in moments:
        count += moment < latest
        latest = max(latest, moment)
    return count


async def _ask(port: int, body: bytes) -> _Streams:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def _read(streams: _Streams) -> tuple[int, int] | None:
    """When the first token came and when the last; None where the answer is not whole."""
    reader, writer = streams
    received, first_ns = bytearray(), None
    try:
        while part := await reader.read(1 << 16):
            received += part
            if first_ns is None and b"data: {" in received:
                first_ns = time.monotonic_ns()
            if first_ns is not None and _DONE in received:
                return first_ns, time.monotonic_ns()
    finally:
        writer.close()
    return None
