"""The HTTP that peers speak: the names in it, requests read strictly, answers put together.

    GET /v1/plan            what is served: plan hash, fingerprint, shards, how far the load is
    GET /v1/files/NAME      a small file: config, index, tokenizer, seal
    GET /v1/shards/NAME     bytes of a shard, as they lie in the arena; `Range` and `If-Match`
    GET /v1/node            who this is, how far its load is, and how many read from it; at once
    PUT /v1/readers/ID      asks to be a reader, or to stay one; 307 names another node to ask
    DELETE /v1/readers/ID   is none any more

HTTP/1.1 (RFC 9110, RFC 9112) without request bodies and without chunks. A request that one could
read in two ways is refused. This module does no I/O.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from coldframe.loader.errors import RequestError

__all__ = [
    "AVOID_HEADER",
    "CHECKPOINT_HEADER",
    "DONE_HEADER",
    "FILES",
    "MAX_HEAD_BYTES",
    "NODE",
    "PLAN",
    "PLAN_HEADER",
    "READERS",
    "SERVES_HEADER",
    "SHARDS",
    "TOKEN_VARIABLE",
    "Answer",
    "ByteRange",
    "Request",
    "matches",
    "parse_range",
    "parse_request",
]

TOKEN_VARIABLE = "COLDFRAME_PEER_TOKEN"

PLAN = "/v1/plan"
FILES = "/v1/files/"
SHARDS = "/v1/shards/"
NODE = "/v1/node"
READERS = "/v1/readers/"

# What the client has planned; another plan, or another checkpoint, is refused with 412.
PLAN_HEADER = "X-Coldframe-Plan"
CHECKPOINT_HEADER = "X-Coldframe-Checkpoint"

# What a node says that wants to read: where it serves itself (`HOST:PORT`, or `:PORT` at the
# address that it asks from), nodes that it could not read from, and how many bytes it has already.
SERVES_HEADER = "X-Coldframe-Serves"
AVOID_HEADER = "X-Coldframe-Avoid"
DONE_HEADER = "X-Coldframe-Done"

MAX_HEAD_BYTES = 16 << 10

_REQUEST_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (/[!-~]*) HTTP/1\.([01])")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*")
_RANGE = re.compile(r"(?i:bytes)=(?:([0-9]{1,18})-([0-9]{1,18})?|-([0-9]{1,18}))")

_DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request.

    Attributes:
        method: `GET`, or any other.
        target: The path as it stands, quoted.
        headers: With names in lower case.
        keep_alive: Whether the client wants to go on with this connection.
        interim: Whether the client knows interim answers (HTTP/1.1).
    """

    method: str
    target: str
    headers: Mapping[str, str]
    keep_alive: bool
    interim: bool


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes of a file from `start` up to, and without, `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    Attributes:
        status: The HTTP status.
        headers: All but `Date`, `Content-Length` and `Connection`.
        length: Bytes of the body.
        parts: The body, one part after the other. A `HEAD` gets none of it.
    """

    status: int
    headers: Mapping[str, str]
    length: int
    parts: tuple[memoryview, ...] = ()

    def head(self, *, keep_alive: bool) -> bytes:
        """The head as it goes on the wire."""
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            f"Date: {_date(time.time())}",
            f"Content-Length: {self.length}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        if not keep_alive:
            lines.append("Connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def parse_request(head: bytes) -> Request:
    """The head of a request, without the empty line behind it.

    Raises:
        RequestError: It is not one, or has a body, or could be read in two ways.
    """
    first, *rest = head.decode("latin-1").split("\r\n")
    line = _REQUEST_LINE.fullmatch(first)
    if line is None:
        raise _malformed("METHOD /path HTTP/1.1", first)
    headers: dict[str, str] = {}
    for text in rest:
        field = _FIELD.fullmatch(text)
        # The value of a field may be a token: not quoted in any error.
        if field is None:
            raise _malformed("fields of a head", "something else")
        name = field[1].lower()
        if name == "host" and name in headers:
            raise _malformed("one Host", "two")
        headers[name] = f"{headers[name]}, {field[2]}" if name in headers else field[2]
    if "transfer-encoding" in headers or headers.get("content-length", "0") != "0":
        raise _malformed("no body", "a body")
    newer = line[3] == "1"
    if newer and "host" not in headers:
        raise _malformed("a Host", "none")
    options = [option.strip().lower() for option in headers.get("connection", "").split(",")]
    return Request(line[1], line[2], headers, newer and "close" not in options, newer)


def parse_range(text: str, size: int) -> ByteRange | None:
    """The part of a file that a `Range` asks for.

    Args:
        text: The value of the field.
        size: Bytes in the file.

    Returns:
        The range, cut to the file and empty where nothing of it is in the file; None for a field
        that is to be ignored: another unit, or several ranges.

    Raises:
        RequestError: It is no range.
    """
    if not text.lower().startswith("bytes=") or "," in text:
        return None
    found = _RANGE.fullmatch(text)
    if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
        raise _malformed("Range: bytes=FIRST-LAST", text)
    if found[3] is not None:
        return ByteRange(max(0, size - int(found[3])), size)
    start = min(int(found[1]), size)
    return ByteRange(start, size if found[2] is None else min(int(found[2]) + 1, size))


def matches(tags: str, tag: str) -> bool:
    """Whether an `If-Match` names an entity tag; strongly compared, so never a weak one."""
    return tags.strip() == "*" or tag in (one.strip() for one in tags.split(","))


def _malformed(expected: str, got: Any) -> RequestError:
    return RequestError("this is no request that peers know", expected=expected, got=str(got)[:100])


def _date(seconds: float) -> str:
    t = time.gmtime(seconds)
    day, month = _DAYS[t.tm_wday], _MONTHS[t.tm_mon - 1]
    clock = f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02}"
    return f"{day}, {t.tm_mday:02} {month} {t.tm_year} {clock} GMT"
