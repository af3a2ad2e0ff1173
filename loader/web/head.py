"""The head of an HTTP/1.1 answer, read strictly (RFC 9112, 4 to 6)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Garbled", "Head", "length_of", "parse_head"]


class Garbled(Exception):
    """What came is not HTTP."""


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer.

    Attributes:
        status: Such as 206.
        reason: The text behind it.
        headers: With names in lower case; those that came twice are joined by commas.
        length: Bytes of the body, or None where only its end will tell.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    length: int | None


def parse_head(head: bytes) -> tuple[str, int, str, dict[str, str]]:
    """Version (such as `1.1`), status, reason, and headers with names in lower case.

    Raises:
        Garbled: It is none.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    match = re.fullmatch(r"HTTP/(\d\.\d) (\d{3})(?: (.*))?", first)
    if match is None:
        raise Garbled("no status line")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise Garbled("a header that is none")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return match[1], int(match[2]), match[3] or "", headers


def length_of(headers: Mapping[str, str]) -> int | None:
    """Bytes of the body as `Content-Length` has them, or None without one.

    Raises:
        Garbled: It is no number, or several.
    """
    text = headers.get("content-length")
    if text is None:
        return None
    lengths = {part.strip() for part in text.split(",")}
    (length,) = lengths if len(lengths) == 1 else ("",)
    if not (length.isascii() and length.isdigit()):
        raise Garbled("a length that is none")
    return int(length)
