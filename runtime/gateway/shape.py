"""The shape of an error that no route gives: the platform's, or OpenAI's on OpenAI's routes."""

from __future__ import annotations

import json
from collections.abc import Callable

from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.platforms.base import Adapter

__all__ = ["Shape", "openai_shape", "raw_answer", "shape_of"]

Shape = Callable[[ApiError, str], tuple[int, object]]
"""Status and JSON of an error, for the path that was asked; empty where that is not known."""


def openai_shape(error: ApiError, _path: str = "") -> tuple[int, object]:
    """A `Shape`: OpenAI's, whatever was asked."""
    return error.status, error.to_openai()


def shape_of(adapter: Adapter) -> Shape:
    """The shape of a platform whose errors an adapter writes."""

    def shape(error: ApiError, path: str = "") -> tuple[int, object]:
        if path.startswith("/v1/"):
            return openai_shape(error)
        return adapter.error(error)

    return shape


def raw_answer(
    error: ApiError, shape: Shape, path: str = ""
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """An error as ASGI sends it: status, headers and body."""
    status, document = shape(error, path)
    body = json.dumps(document).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return status, headers, body
