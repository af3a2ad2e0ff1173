"""A URL in its parts, and what of it may be shown: never its user info, its query or its fragment.

Both may hold secrets: a password the one, a signature the other. Whatever refuses a URL here must
not quote it, since it cannot know which part of it was meant to be what.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urljoin, urlsplit

__all__ = ["Url", "host_name"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_PATH_SAFE = "/%:@!$&'()*+,;=~"
_QUERY_SAFE = _PATH_SAFE + "?[]"


@dataclass(frozen=True, slots=True)
class Url:
    """An absolute `http` or `https` URL.

    Attributes:
        scheme: `http` or `https`.
        host: Name or address in lower case, without brackets.
        port: TCP port.
        path: Quoted; empty, or begins with a slash.
        query: Quoted, without the question mark.
        basic: The `Authorization` that its user info stands for, or None.
    """

    scheme: str
    host: str
    port: int
    path: str = field(default="", repr=False)
    query: str = field(default="", repr=False)
    basic: str | None = field(default=None, repr=False)

    @staticmethod
    def parse(text: str) -> Url:
        """The parts of a URL.

        Raises:
            ValueError: It is none; the text says why, without quoting it.
        """
        try:
            parts = urlsplit(text)
        except ValueError:
            raise ValueError("it cannot be parsed") from None
        scheme = parts.scheme.lower()
        if scheme not in _DEFAULT_PORTS:
            raise ValueError("it is neither http nor https")
        try:
            port = parts.port
        except ValueError:
            raise ValueError("its port is not a number up to 65535") from None
        host = host_name(parts.hostname or "")
        basic = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            basic = f"Basic {b64encode(pair.encode()).decode()}"
        return Url(
            scheme,
            host,
            _DEFAULT_PORTS[scheme] if port is None else port,
            quote(parts.path, safe=_PATH_SAFE),
            quote(parts.query, safe=_QUERY_SAFE),
            basic,
        )

    @property
    def origin(self) -> tuple[str, str, int]:
        """Who answers: scheme, host and port."""
        return self.scheme, self.host, self.port

    @property
    def target(self) -> str:
        """Path and query, as they go on the wire."""
        path = self.path or "/"
        return f"{path}?{self.query}" if self.query else path

    @property
    def server(self) -> str:
        """Scheme, host and port, for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    @property
    def uri(self) -> str:
        """All of it that may be shown."""
        return self.server + self.path.rstrip("/")

    def __str__(self) -> str:
        return self.uri

    def child(self, name: str) -> Url:
        """A file below it, with the same query."""
        path = f"{self.path.rstrip('/')}/{quote(name)}"
        return Url(self.scheme, self.host, self.port, path, self.query, self.basic)

    def join(self, reference: str) -> Url:
        """Where a `Location` that is relative to it leads.

        Raises:
            ValueError: Nowhere that could be asked.
        """
        try:
            joined = urljoin(self.server + self.target, reference)
        except ValueError:
            raise ValueError("it cannot be parsed") from None
        return Url.parse(joined)


def host_name(text: str) -> str:
    """A host's name or address as the resolver takes it.

    Raises:
        ValueError: There is no such name.
    """
    try:
        name = text.encode("idna").decode().lower()
    except UnicodeError:
        name = ""
    if not name or any(not (c.isalnum() or c in ".-_:") for c in name):
        raise ValueError("it has no valid host name")
    return name
