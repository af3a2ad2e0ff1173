"""What the range reader asks of a kind of store: where its files are, and what its answers mean.

The reader (`ranges`) is one; stores differ in how a request is addressed and signed, and in how
they say no. That, and only that, is an address.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Address", "Again", "Refusal", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """One request, ready to be sent.

    Attributes:
        scheme: `http` or `https`.
        host: Name or address, without brackets.
        port: TCP port.
        path: The request target as it goes on the wire: path and query, quoted.
        headers: All headers but `Host`, `Range` among them. They hold credentials: never shown.
    """

    scheme: str
    host: str
    port: int
    path: str = field(repr=False)
    headers: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is not what was asked for.

    Attributes:
        status: The HTTP status.
        reason: Its text.
        headers: With names in lower case.
        body: The first 64 KiB at most.
        target: The request.
        what: What was asked for, for an error: the file's URI and the range.
    """

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    target: Target
    what: str


@dataclass(frozen=True, slots=True)
class Again:
    """The same request may fare better another time.

    Attributes:
        after_s: Not before so many seconds, where the server said so.
        slow_down: The server has too much to do: fewer requests at once from now on.
        at_once: The address itself has changed (a redirect followed, credentials renewed):
            no pause is needed.
        why: For the error when patience ends.
    """

    why: str
    after_s: float | None = None
    slow_down: bool = False
    at_once: bool = False


class Address(Protocol):
    """Where the files of a checkpoint are, and how they are asked for. Safe for several threads."""

    @property
    def uri(self) -> str:
        """The place, for people: no credentials, no signatures in it."""
        ...

    def uri_of(self, name: str) -> str:
        """A file of it, for people."""
        ...

    def target(self, name: str, headers: Mapping[str, str]) -> Target:
        """The request for a file, addressed and signed anew for each attempt.

        Args:
            name: A file's name, relative to the place.
            headers: What the reader wants to send: `Range`, `If-Match`.

        Raises:
            SourceError: It cannot be addressed or signed: no credentials, no region.
        """
        ...

    def refused(self, refusal: Refusal) -> Again:
        """What a refusal means, for this kind of store.

        Returns:
            That it may be asked again.

        Raises:
            SourceError: It may not; the error says why. `SourceNotFound` for a file that is not
                there.
        """
        ...
