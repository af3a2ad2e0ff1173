"""Web pages of other origins: none may ask, except those that are named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from coldframe.loader.errors import PlatformError

__all__ = ["check_origins", "with_cors"]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_EXPOSED = ("x-request-id", "server-timing", "retry-after", "retry-after-ms")


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Origins as browsers send them, or `*`.

    Raises:
        PlatformError: One is something else, and would never match.
    """
    for origin in origins:
        if origin != "*" and origin != "null" and not _ORIGIN.fullmatch(origin):
            raise PlatformError(
                "this is no origin",
                where="--cors-origin",
                expected="https://host or https://host:port, in lower case and without a path",
                got=origin,
                hint="Give what the browser's address bar begins with, or * for every page.",
            )
    return tuple(origins)


def with_cors(app: Any, origins: Sequence[str]) -> Any:
    """The application, for pages of these origins too; as it is, where there are none.

    It stands outside the guard of the keys: a browser asks whether it may (`OPTIONS`) without
    sending any. Answers to wrong keys can be read by the page as well.

    Args:
        app: ASGI.
        origins: See `check_origins`.
    """
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(
        app,
        allow_origins=list(check_origins(origins)),
        allow_methods=["GET", "POST", "OPTIONS"],
        allow_headers=["*"],  # clients send a dozen headers of their own with each request
        allow_credentials=False,  # keys are in headers; cookies mean nothing here
        expose_headers=list(_EXPOSED),
    )
