"""What a translation between a platform's bodies and OpenAI's has to offer.

OpenAI's bodies are the pivot: an adapter reads a platform's JSON into them, and writes OpenAI's
answers back. It checks the shape that is the platform's own; what a parameter may be is checked
once, where OpenAI's bodies are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from coldframe.runtime.gateway.api import ApiError

__all__ = ["Adapter", "Events", "OpenAIEvents", "Requests", "sse"]


@dataclass(frozen=True, slots=True)
class Requests:
    """What one body of a platform asks for.

    Args:
        items: Each `chat` or `completion`, and OpenAI's body for it.
        stream: Whether the answer is to be sent as it comes; then there is one item.
        shape: In which of the adapter's shapes it came.
        notes: What the adapter needs to write the answer.
    """

    items: tuple[tuple[str, dict[str, Any]], ...]
    stream: bool = False
    shape: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)


class Events(Protocol):
    """One streamed answer, in frames of server-sent events."""

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        """The frames for one of OpenAI's chunks; may be none."""
        ...

    def done(self) -> bytes:
        """The last frames, after the last chunk."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """The last frames, where it broke off."""
        ...


class Adapter(Protocol):
    """A platform's bodies."""

    def read(
        self, body: object, *, path: Mapping[str, str] | None = None, sse: bool = False
    ) -> Requests:
        """OpenAI's bodies for a platform's.

        Args:
            body: Parsed JSON.
            path: The parameters of the route.
            sse: Whether the client accepts nothing but server-sent events.

        Raises:
            ApiError: It is not such a body.
        """
        ...

    def write(self, requests: Requests, answers: Sequence[Mapping[str, Any]]) -> object:
        """The platform's JSON for OpenAI's answers.

        Args:
            requests: What was read.
            answers: A `chat.completion` or `text_completion` for each item, in their order.
        """
        ...

    def error(self, error: ApiError) -> tuple[int, object]:
        """The status and the platform's JSON for an error."""
        ...

    def events(self, requests: Requests) -> Events:
        """A writer for a streamed answer."""
        ...


class OpenAIEvents:
    """OpenAI's chunks as they are, for platforms that have no frames of their own."""

    def chunk(self, chunk: Mapping[str, Any]) -> bytes:
        return sse(chunk)

    def done(self) -> bytes:
        return b"data: [DONE]\n\n"

    def failed(self, error: ApiError) -> bytes:
        return sse(error.to_openai())


def sse(data: object, event: str | None = None) -> bytes:
    """One server-sent event.

    Args:
        data: JSON values.
        event: Its name, where it has one.
    """
    head = f"event: {event}\n" if event else ""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate in a client's JSON is legal there, but has no UTF-8.
    return f"{head}data: {text}\n\n".encode("utf-8", "replace")
