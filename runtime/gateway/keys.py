"""API keys: where they come from, who must show one, and that nobody else ever sees them.

The front reads them, takes them out of its environment before it starts any process, and tells
the gateway alone, over their socket. They are in no argument, file of ours, log, error or timeline.
The gateway itself keeps only their digests.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import PlatformError
from coldframe.runtime.gateway.api import ApiError
from coldframe.runtime.gateway.shape import Shape, openai_shape, raw_answer

__all__ = [
    "KEYS_FILE_VARIABLE",
    "KEYS_VARIABLE",
    "ApiKeys",
    "KeyGuard",
    "LoadedKeys",
    "load_keys",
    "open_paths",
]

KEYS_VARIABLE = "COLDFRAME_API_KEYS"
KEYS_FILE_VARIABLE = "COLDFRAME_API_KEYS_FILE"

_SHORT = 16
_LONGEST = 1024
_LARGEST_FILE = 1 << 20
_HEADERS = (b"x-api-key", b"api-key")


@dataclass(frozen=True, slots=True)
class LoadedKeys:
    """What the environment says about keys.

    Args:
        keys: Each once; none where the endpoint is open.
        warnings: Sentences for the log, without any key.
    """

    keys: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"LoadedKeys({len(self.keys)} keys)"


def load_keys(environ: Mapping[str, str] = os.environ, *, loopback: bool = True) -> LoadedKeys:
    """The API keys that the environment gives, itself or in a file that it names.

    In both they are set apart by commas or ends of line; spaces around them don't count. A variable
    that is set and holds no key is an error: it is a secret that has not arrived, and a server that
    is open because of it is found by somebody else first.

    Args:
        environ: The environment.
        loopback: Whether only this machine can reach the endpoint, for the warnings.

    Raises:
        PlatformError: What it says is not usable.
    """
    found: list[str] = []
    if KEYS_VARIABLE in environ:
        found += _split(environ[KEYS_VARIABLE], KEYS_VARIABLE)
    if KEYS_FILE_VARIABLE in environ:
        found += _split(_read(environ[KEYS_FILE_VARIABLE]), KEYS_FILE_VARIABLE)
    keys = tuple(dict.fromkeys(found))
    warnings = []
    if short := sum(len(key) < _SHORT for key in keys):
        few = "an API key has" if short == 1 else f"{short} API keys have"
        warnings.append(f"{few} fewer than {_SHORT} characters and can be guessed")
    if not keys and not loopback:
        warnings.append(
            "anybody who reaches this port can use the model: there are no API keys"
            f" (set {KEYS_VARIABLE})"
        )
    return LoadedKeys(keys, tuple(warnings))


class ApiKeys:
    """Keys to hold others against, without keeping them.

    Args:
        keys: As they are sent.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._salt = os.urandom(32)
        self._digests = tuple(self._digest(key.encode()) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._digests)} keys)"

    def match(self, presented: bytes) -> bool:
        """Whether it is one of them. How long that takes says nothing about any of them."""
        from hmac import compare_digest

        digest = self._digest(presented)
        found = False
        for known in self._digests:  # all of them, always
            found |= compare_digest(digest, known)
        return found

    def _digest(self, key: bytes) -> bytes:
        # A keyed digest: equal lengths to compare, and none that could be computed in advance.
        from hashlib import blake2b  # OpenSSL comes with it; without keys nobody needs either

        return blake2b(key, key=self._salt).digest()


def open_paths(health: Collection[str], *, metrics: bool = False) -> frozenset[str]:
    """What may be asked without a key: whether the replica lives and is ready, and little else.

    The page at `/` knows nothing itself, and is where a person types the key in.

    Args:
        health: The platform's routes.
        metrics: Whether `/metrics` is open too.
    """
    return frozenset({"/", "/healthz", "/readyz", *health, *(["/metrics"] if metrics else [])})


class KeyGuard:
    """ASGI middleware that lets nobody pass without a key.

    A key may stand in `Authorization: Bearer`, `x-api-key` or `api-key`. One that is right is
    enough: platforms put credentials of their own into `Authorization`.

    Args:
        app: What is guarded.
        keys: With none, everybody passes.
        open_paths: Paths that may be read (GET, HEAD) without one; see `open_paths`.
        shape: Of an error.
    """

    def __init__(
        self,
        app: Any,
        keys: ApiKeys,
        open_paths: Collection[str],
        shape: Shape = openai_shape,
    ) -> None:
        self._app = app
        self._shape = shape
        self._keys = keys
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan" or not self._keys:
            await self._app(scope, receive, send)
        elif kind != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] in self._open and scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
        else:
            presented = _presented(scope["headers"])
            # No `any` here: it would stop at the first that is right.
            if sum([self._keys.match(key) for key in presented]):
                await self._app(scope, receive, send)
            else:
                error = _refusal(bool(presented))
                status, headers, body = raw_answer(error, self._shape, scope["path"])
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})


def _presented(headers: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    found = []
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer" and key.strip():
                found.append(key.strip())
        elif name in _HEADERS and value:
            found.append(value)
    return found


def _refusal(presented: bool) -> ApiError:
    message = (
        "This API key is not valid here."
        if presented
        else "An API key is needed: send `Authorization: Bearer KEY`."
    )
    return ApiError(401, message, code="invalid_api_key")


def _split(text: str, where: str) -> list[str]:
    keys = [key.strip() for line in text.splitlines() for key in line.split(",")]
    keys = [key for key in keys if key]
    if not keys:
        raise PlatformError(
            "there is no API key",
            where=where,
            expected="keys, set apart by commas",
            got="nothing",
            hint="Give one, or unset it to let everybody in.",
        )
    for index, key in enumerate(keys):
        if not (key.isascii() and key.isprintable() and " " not in key and len(key) <= _LONGEST):
            raise PlatformError(
                "this is no API key",
                where=f"{where}, key {index + 1} of {len(keys)}",
                expected=f"up to {_LONGEST} letters, digits and signs without spaces",
                hint="Make one with `openssl rand -hex 32`.",
            )
    return keys


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(_LARGEST_FILE + 1)
        if len(raw) > _LARGEST_FILE:
            raise ValueError(f"more than {_LARGEST_FILE} bytes")
        return raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        # A decoder's own words repeat what it could not decode.
        got: object = error
        if isinstance(error, OSError):
            got = error.strerror
        elif isinstance(error, UnicodeDecodeError):
            got = "something else than text"
        raise PlatformError("the file of API keys cannot be read", where=path, got=got) from None
