"""Logs of the front and the gateway: one line each on standard error, JSON or text.

Whatever comes from outside is escaped, so that nobody writes lines of their own into the log or
control sequences into a terminal, and cut where it is long. What is secret is replaced wherever it
turns up. Python's `logging` is not needed for this, and the front starts without it; what libraries
say through it comes here by way of `log_bridge`.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from copy import copy
from math import isfinite

TYPE_CHECKING = False  # `typing` itself is slow to import
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

__all__ = ["LEVELS", "Log", "Redactor"]

LEVELS = ("debug", "info", "warning", "error")

_LONGEST = 4096
_MOST_ITEMS = 64
_HIDDEN = "***"
_PLAIN = re.compile(r"[A-Za-z0-9_.:/+@%=-]+")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s\"',]+")


class Redactor:
    """Replaces secrets in texts.

    Args:
        secrets: Their values. One of three characters or fewer is in every other word, and stays.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        forms = {form for secret in secrets if len(secret) > 3 for form in _forms(secret)}
        # The longer first: one secret may be the beginning of another.
        longest = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest))) if longest else None

    def __call__(self, text: str) -> str:
        if self._pattern is not None:
            text = self._pattern.sub(_HIDDEN, text)
        if "earer" in text.lower():
            text = _BEARER.sub(rf"\g<1>{_HIDDEN}", text)
        return text


class Log:
    """Writes lines.

    Args:
        form: `json` or `text`.
        level: The least that is written: one of `LEVELS`.
        process: Who writes: `front` or `gateway`.
        secrets: Values that are replaced.
        fd: Where to; standard error.
    """

    def __init__(
        self,
        form: str = "json",
        level: str = "info",
        *,
        process: str,
        secrets: Iterable[str] = (),
        fd: int = 2,
    ) -> None:
        self._render = _as_json if form == "json" else _as_text
        self._least = LEVELS.index(level)
        self._process = process
        self._redact = Redactor(secrets)
        self._fd = fd
        self._always: dict[str, Any] = {}

    def about(self, **fields: Any) -> Log:
        """This log, with fields that each of its lines has."""
        log = copy(self)
        log._always = {**self._always, **fields}
        return log

    def debug(self, event: str, **fields: Any) -> None:
        self.write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self.write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self.write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self.write("error", event, fields)

    def write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Writes one line. A log that cannot be written is no reason to stop: that line is lost.

        Args:
            level: One of `LEVELS`.
            event: What happened; always the same words for the same thing.
            fields: To what; None is left out.
        """
        if LEVELS.index(level) < self._least:
            return
        record = {
            "time": _rfc3339(time.time()),
            "level": level,
            "process": self._process,
            "event": self._plain(event),
        }
        for name, value in {**self._always, **fields}.items():
            if value is not None:
                record[name] = self._plain(value)
        with suppress(OSError):
            os.write(self._fd, (self._render(record) + "\n").encode())

    def _plain(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, bool | int) or value is None:
            return value
        if isinstance(value, float):
            return round(value, 6) if isfinite(value) else str(value)
        if depth < 4 and isinstance(value, dict):
            items = list(value.items())[:_MOST_ITEMS]
            return {self._text(key): self._plain(item, depth + 1) for key, item in items}
        if depth < 4 and isinstance(value, list | tuple):
            return [self._plain(item, depth + 1) for item in value[:_MOST_ITEMS]]
        return self._text(value)

    def _text(self, value: Any) -> str:
        # First replaced, then cut: half a secret is not recognised.
        text = self._redact(value if isinstance(value, str) else str(value))
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def _rfc3339(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03}Z"


def _as_json(record: dict[str, Any]) -> str:
    # ASCII only: also what a terminal takes for the end of a line or the start of a sequence, and
    # halves of surrogate pairs, are escaped then.
    return json.dumps(record)


def _as_text(record: dict[str, Any]) -> str:
    known = ("time", "level", "process", "event")
    head = f"{record['time']} {record['level'].upper():7} {record['process']}: "
    event = record["event"]
    head += event if event.isascii() and event.isprintable() else json.dumps(event)
    return head + "".join(
        f" {name}={_value(value)}" for name, value in record.items() if name not in known
    )


def _value(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return json.dumps(value)


def _forms(secret: str) -> Iterable[str]:
    """How a secret may be written: as it is, in JSON, in Python, in a URL."""
    yield secret
    if not secret.isalnum():
        from urllib.parse import quote

        yield json.dumps(secret)[1:-1]
        yield repr(secret)[1:-1]
        yield quote(secret, safe="")
