"""Quantities as people write them: 200MB/s, 4GiB, 1.5k, 500ms."""

from __future__ import annotations

import argparse
import math
import re

__all__ = [
    "byte_count",
    "byte_count_or_none",
    "byte_rate",
    "duration",
    "first_line",
    "human_bytes",
    "human_seconds",
]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)

_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0}
_DURATION = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|m|)\s*")


def byte_count(text: str) -> int:
    """Bytes from text such as `512MB` (10^6) or `4GiB` (2^30).

    Raises:
        argparse.ArgumentTypeError: It is not such a text.
    """
    size = byte_count_or_none(text)
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return size


def byte_count_or_none(text: str) -> int:
    """As `byte_count`, and 0 for none.

    Raises:
        argparse.ArgumentTypeError: It is not such a text.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512MB or 4GiB")
    unit = match[2].lower()
    return int(float(match[1]) * (_BINARY[unit] if match[3] else _UNITS[unit]))


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits on a line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def byte_rate(text: str) -> float:
    """Bytes per second from text such as `200MB/s`.

    Raises:
        argparse.ArgumentTypeError: It is not such a text.
    """
    size, slash, second = text.partition("/")
    if (slash and second.strip() != "s") or _QUANTITY.fullmatch(size) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; write 200MB/s")
    return float(byte_count(size))


def duration(text: str) -> float:
    """Seconds from text such as `500ms`, `2s`, `2` or `5m`.

    Raises:
        argparse.ArgumentTypeError: It is not such a text, or no time.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 500ms or 1.5s")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not above zero")
    return seconds


def human_bytes(count: float) -> str:
    """Three digits and a decimal unit: 426 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:.0f} TB"


def human_seconds(seconds: float) -> str:
    """Milliseconds below one second: 87 ms, 2.31 s."""
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.2f} s"
