"""Files below an HTTP(S) URL: how they are asked for, and what the server's refusals mean.

Credentials go to the server that the URL names and to no other; a redirect leads on without them.
Errors show neither those nor a URL's query, which may be a signature, nor anything else that the
server wrote: it may quote either.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from http import HTTPStatus

from coldframe.loader.errors import (
    SourceCredentials,
    SourceDenied,
    SourceError,
    SourceNotFound,
)
from coldframe.loader.sources.location import Http
from coldframe.loader.web.address import Again, Refusal, Target
from coldframe.loader.web.redirects import FoundTarget, Redirects
from coldframe.loader.web.url import Url

__all__ = [
    "HttpAddress",
    "bearer",
    "later",
    "other_error",
    "refusal_error",
    "request_headers",
    "status_of",
]

TOKEN_VARIABLE = "COLDFRAME_HTTP_TOKEN"


class HttpAddress:
    """The files below a URL.

    Args:
        location: The URL. Its user info is sent as basic authentication, its query with every
            request. Where it has no user info, `COLDFRAME_HTTP_TOKEN` is sent as a bearer token:
            `TOKEN` to the URL's server whichever that is, `TOKEN@HOST` if it is that host.

    Raises:
        SourceCredentials: The token is none that could be sent.
    """

    def __init__(self, location: Http) -> None:
        self._url = location.url
        self._authorization = location.url.basic or _token_for(location.url.host)
        self._redirects = Redirects(location.url.child)

    @property
    def uri(self) -> str:
        return self._url.uri

    def uri_of(self, name: str) -> str:
        return self._url.child(name).uri

    def target(self, name: str, headers: Mapping[str, str]) -> Target:
        return self._redirects.target(
            name, lambda url: request_headers(headers, url, self._url, self._authorization)
        )

    def refused(self, refusal: Refusal) -> Again:
        again = self._redirects.again(refusal) or later(refusal)
        if again is not None:
            return again
        if refusal.status == 401:
            raise refusal_error(
                SourceCredentials, "the server wants credentials", refusal, self._remedy()
            )
        if refusal.status == 403:
            hint = "Check the credentials and what they may read."
            if self._url.query:
                hint += " If the URL is signed, its signature may have expired."
            raise refusal_error(SourceDenied, "the server does not let it be read", refusal, hint)
        if refusal.status in (404, 410):
            hint = "Check the URL: it is the folder's that config.json is in."
            raise refusal_error(SourceNotFound, "the server has no such file", refusal, hint)
        raise other_error(refusal)

    def _remedy(self) -> str:
        if self._url.basic:
            return "The server does not take those of the URL."
        if self._authorization:
            return f"The server does not take the token of {TOKEN_VARIABLE}."
        return f"Give them as https://user:password@host, or a bearer token in {TOKEN_VARIABLE}."


def request_headers(
    headers: Mapping[str, str], url: Url, home: Url, authorization: str | None
) -> dict[str, str]:
    """What is sent to a server: credentials to the one that they are for, and to no other.

    Args:
        headers: What the reader wants to send.
        url: What is asked.
        home: Whose credentials they are. The same host over https is as good as over http.
        authorization: The credentials.
    """
    merged = {"User-Agent": "coldframe", **headers}
    upgraded = home.origin == ("http", home.host, 80) and url.origin == ("https", home.host, 443)
    if authorization is not None and (url.origin == home.origin or upgraded):
        merged["Authorization"] = authorization
    return merged


def bearer(token: str, source: str) -> str:
    """The `Authorization` for a token.

    Args:
        token: As it was found.
        source: Where, for an error.

    Raises:
        SourceCredentials: It holds characters that no header may.
    """
    if not token.isascii() or not token.isprintable() or " " in token:
        raise SourceCredentials(
            "this is no token",
            where=source,
            expected="letters, digits and signs",
            got="spaces, control characters or other letters in it",
            hint="Set it anew.",
        )
    return f"Bearer {token}"


def _token_for(host: str) -> str | None:
    token, at, only = os.environ.get(TOKEN_VARIABLE, "").strip().partition("@")
    if not token or (at and only.lower() != host):
        return None
    return bearer(token, TOKEN_VARIABLE)


def later(refusal: Refusal) -> Again | None:
    """Whether a server that says so only cannot answer now."""
    if refusal.status not in (408, 429) and refusal.status < 500:
        return None
    return Again(
        status_of(refusal),
        after_s=_retry_after_s(refusal.headers.get("retry-after")),
        slow_down=refusal.status in (429, 503),
    )


def _retry_after_s(text: str | None) -> float | None:
    """RFC 9110, 10.2.3: seconds, or a date."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def status_of(refusal: Refusal) -> str:
    """The status, in words of our own, and who answered it where that was after a redirect."""
    try:
        text = f"status {refusal.status} {HTTPStatus(refusal.status).phrase}"
    except ValueError:
        text = f"status {refusal.status}"
    target = refusal.target
    if isinstance(target, FoundTarget) and target.place.hops:
        text += f" from {target.place.url.server}, where it was redirected"
    return text


def refusal_error(
    kind: type[SourceError], what: str, refusal: Refusal, hint: str | None = None
) -> SourceError:
    """The error for a refusal, with nothing in it that the server wrote."""
    return kind(what, where=refusal.what, got=status_of(refusal), hint=hint)


def other_error(refusal: Refusal) -> SourceError:
    """The error for a refusal that means the same at every server."""
    if refusal.status == 407:
        return refusal_error(
            SourceCredentials,
            "the proxy wants credentials",
            refusal,
            "Give them in the proxy's URL, in HTTP_PROXY or HTTPS_PROXY.",
        )
    return refusal_error(
        SourceError,
        "the server refuses to send it",
        refusal,
        "Ask whoever runs that server or the proxy before it.",
    )
