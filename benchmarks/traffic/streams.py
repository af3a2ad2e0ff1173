"""An answer as its bytes came, and what it says: when each part of a stream of events was whole."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

__all__ = ["Read", "Stamped", "read_stream", "unchunked"]

_BLANK_LINE = b"\r\n\r\n"
_DATA = b"data: "
_DONE = b"[DONE]"


class Stamped:
    """Bytes, and when they came."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._moments: list[float] = []

    def add(self, moment: float, data: bytes) -> None:
        self._moments.append(moment)
        self._parts.append(data)

    @property
    def raw(self) -> bytes:
        """All of them."""
        return b"".join(self._parts)

    def moments(self, ends: list[int]) -> list[float]:
        """When the bytes up to each of these places were there."""
        come = list(accumulate(len(part) for part in self._parts))
        return [self._moments[bisect_left(come, end)] for end in ends]


@dataclass(slots=True)
class Read:
    """What an answer says.

    Args:
        status: Of HTTP; None where there was not even a head.
        error: What the server says of what went wrong.
        first_at: When the first event with a token was there, be there text of it yet or not.
        text_at: When each event with text was there.
        end_at: When the event that has the finish reason was; None where there was none.
        tokens: Tokens of the answer, as the server's `usage` has them.
    """

    status: int | None = None
    error: str | None = None
    first_at: float | None = None
    text_at: list[float] = field(default_factory=list)
    end_at: float | None = None
    tokens: int = 0


def read_stream(stamped: Stamped) -> Read:
    """Reads an answer to a streamed completion; one that broke off as far as it came."""
    raw = stamped.raw
    head_end = raw.find(_BLANK_LINE)
    if head_end < 0:
        return Read()
    status_line, *headers = raw[:head_end].split(b"\r\n")
    read = Read(status=int(status_line.split()[1]))
    start = head_end + len(_BLANK_LINE)
    chunked = any(
        line.lower().replace(b" ", b"") == b"transfer-encoding:chunked" for line in headers
    )
    body, places = unchunked(raw, start) if chunked else (raw[start:], [(0, start)])
    if read.status != 200:
        read.error = body.decode(errors="replace")[:300]
        return read
    texts: list[int] = []
    first: int | None = None
    end: int | None = None
    for event, place in _events(body, places):
        if "error" in event:
            read.error = json.dumps(event["error"])[:300]
        if event.get("usage"):
            read.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            first = place if first is None else first
            if choice.get("text"):
                texts.append(place)
            if choice.get("finish_reason") is not None:
                end = place
    read.text_at = stamped.moments(texts)
    if first is not None:
        (read.first_at,) = stamped.moments([first])
    if end is not None:
        (read.end_at,) = stamped.moments([end])
    return read


def _events(body: bytes, places: list[tuple[int, int]]) -> list[tuple[dict[str, Any], int]]:
    """The events that are whole, each with where in what was received it ends."""
    found = []
    starts = [start for start, _ in places]
    at = 0
    while (end := body.find(b"\n\n", at)) >= 0:
        data = body[at:end].strip()
        at = end + 2
        if not data.startswith(_DATA) or data[len(_DATA) :] == _DONE:
            continue
        start, raw = places[bisect_right(starts, end + 1) - 1]
        found.append((json.loads(data[len(_DATA) :]), raw + end + 2 - start))
    return found


def unchunked(raw: bytes, at: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The body without its chunks' frames, as far as it came.

    Args:
        raw: What was received.
        at: Where the body begins in it.

    Returns:
        It, and of each chunk where it begins there and in what was received.
    """
    parts: list[bytes] = []
    places: list[tuple[int, int]] = []
    length = 0
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line_end].split(b";")[0], 16)
        if size == 0:
            break
        begin = line_end + 2
        parts.append(raw[begin : begin + size])
        places.append((length, begin))
        length += len(parts[-1])
        at = begin + size + 2
    return b"".join(parts), places
