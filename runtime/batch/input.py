"""A batch's requests, read a line at a time: what is in memory is one line, however long the file.

Who asks for a line never waits for it: a pipe that has none yet says so. What a line says is
checked here as far as that goes without the model.
"""

from __future__ import annotations

import os
import select
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import CheckpointError, SourceError
from coldframe.loader.files import source_error
from coldframe.loader.strict_json import describe, parse_object
from coldframe.runtime.gateway.api import ApiError

__all__ = ["CHAT", "MAX_CUSTOM_ID", "URLS", "BatchLine", "LineReader", "open_input", "parse_line"]

CHAT = "/v1/chat/completions"
URLS = (CHAT, "/v1/completions")
MAX_CUSTOM_ID = 512
"""Characters; long enough for anybody's, and short enough to be found at the head of an answer."""

_CHUNK = 256 << 10
_BOM = b"\xef\xbb\xbf"
_OTHER_ROUTES = "This model answers " + " and ".join(URLS) + "."


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line of the input.

    Args:
        number: Counted from 1.
        custom_id: The caller's name for it; None where it has none that can be used.
        url: The route.
        body: The request.
        error: What is wrong with the line, where something is.
    """

    number: int
    custom_id: str | None = None
    url: str = ""
    body: dict[str, Any] | None = None
    error: ApiError | None = None


def open_input(path: str) -> int:
    """A descriptor of the input; `-` is standard input.

    Raises:
        SourceError: It cannot be opened, or is a directory.
    """
    if path == "-":
        return os.dup(0)
    hint = "Name a file with one request a line, or - for standard input."
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        if os.path.isdir(fd):
            os.close(fd)
            raise SourceError("the input is a directory", where=path, hint=hint)
    except (OSError, ValueError) as error:
        raise source_error(error, path, hint) from None
    return fd


class LineReader:
    """Lines of a file or a pipe.

    Args:
        fd: Where they come from; it is closed with the reader.
        where: Its name, for errors.
        limit: Bytes of a line at most. What is longer is passed over in pieces.
    """

    def __init__(self, fd: int, where: str, limit: int) -> None:
        self.fd = fd
        self._where = where
        self._limit = limit
        self._buffer = bytearray()
        self._searched = 0
        self._too_long = False
        self._at_end = False
        self.number = 0
        """Lines so far."""
        self.blocked = False
        """Whether the last call found that nothing is there yet."""

    @property
    def ended(self) -> bool:
        """Whether there are no more lines."""
        return self._at_end and not self._buffer and not self._too_long

    def next(self) -> bytes | ApiError | None:
        """The next line without its end, or what is wrong with it.

        Returns:
            None where there is none: the input has ended, or it is `blocked`.

        Raises:
            SourceError: It cannot be read.
        """
        self.blocked = False
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                return self._take(end, end + 1)
            self._searched = len(self._buffer)
            if self._searched > self._limit:
                self._too_long = True
                self._forget(self._searched)
            if self._at_end:
                return None if self.ended else self._take(self._searched, self._searched)
            if not self._fill():
                return None

    def wait(self) -> None:
        """Waits until a `blocked` input has more, or has ended."""
        select.select([self.fd], [], [])

    def close(self) -> None:
        os.close(self.fd)

    def _fill(self) -> bool:
        """Reads on; whether there was anything to read, or the end."""
        if not select.select([self.fd], [], [], 0)[0]:
            self.blocked = True
            return False
        try:
            chunk = os.read(self.fd, _CHUNK)
        except OSError as error:
            raise SourceError(
                "the input cannot be read", where=self._where, got=error.strerror
            ) from error
        self._buffer += chunk
        self._at_end = not chunk
        return True

    def _take(self, end: int, behind: int) -> bytes | ApiError:
        line = bytes(self._buffer[:end])
        self._forget(behind)
        self.number += 1
        too_long, self._too_long = self._too_long or len(line) > self._limit, False
        if too_long:
            return ApiError(
                413,
                f"A line may have at most {self._limit:,} bytes; --max-line allows others.",
                code="line_too_long",
            )
        return line.removeprefix(_BOM) if self.number == 1 else line

    def _forget(self, count: int) -> None:
        del self._buffer[:count]
        self._searched = 0


def parse_line(number: int, line: bytes | ApiError) -> BatchLine:
    """What a line says, or what is wrong with it; a name that it gives itself is kept either way.

    Args:
        number: Counted from 1.
        line: What `LineReader.next` gave.
    """
    if isinstance(line, ApiError):
        return BatchLine(number, error=line)
    try:
        data = parse_object(line, where="", hint="")
    except CheckpointError as error:
        got = "" if error.got is None else f": {error.got}"
        message = f"A line must be a JSON object, but {error.what}{got}."
        return BatchLine(number, error=ApiError(400, message, code="invalid_json"))
    name, url, body = data.get("custom_id"), data.get("url"), data.get("body")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_CUSTOM_ID:
        expected = f"A line needs a custom_id, a string of 1 to {MAX_CUSTOM_ID} characters"
        return BatchLine(number, error=_wrong(f"{expected}, not {describe(name)}.", "custom_id"))
    wrong = _envelope_error(data.get("method", "POST"), url, body)
    if wrong is not None:
        return BatchLine(number, name, error=wrong)
    return BatchLine(number, name, str(url), body)


def _envelope_error(method: object, url: object, body: object) -> ApiError | None:
    if method != "POST":
        return _wrong(f"The method must be POST, not {describe(method)}.", "method")
    if url not in URLS:
        return _wrong(f"There is no route {describe(url)} here. {_OTHER_ROUTES}", "url")
    if not isinstance(body, dict):
        return _wrong(f"The body must be an object, not {describe(body)}.", "body")
    if body.get("stream"):
        return _wrong("A batch has no streams; leave `stream` out.", "stream")
    return None


def _wrong(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
