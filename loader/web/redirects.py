"""Redirects of a place's files: followed, remembered, and asked for anew when they have expired.

A store may answer with a signed URL of another server, which is good for some minutes. It is
remembered, so that not each range costs two round trips; once it is refused, the file's own URL is
asked again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coldframe.loader.errors import SourceProtocol
from coldframe.loader.web.address import Again, Refusal, Target
from coldframe.loader.web.url import Url

__all__ = ["FoundTarget", "Place", "Redirects"]

_STATUSES = frozenset({301, 302, 303, 307, 308})
_EXPIRED = frozenset({401, 403, 404, 410})
_MAX_HOPS = 5

_FRESH_S = 10.0
"""A URL that was given out so shortly ago has not expired: whoever refuses it means it."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a file is, as far as is known.

    Attributes:
        url: Its URL.
        hops: Redirects that led there.
        since: When the last one came, in monotonic seconds.
        renewed: It was asked for anew since a redirect was refused.
    """

    url: Url
    hops: int = 0
    since: float = 0.0
    renewed: bool = False


@dataclass(frozen=True, slots=True)
class FoundTarget(Target):
    """A request that knows which file it is for and what was known of it.

    Attributes:
        name: The file.
        place: Where it is asked for.
    """

    name: str
    place: Place


class Redirects:
    """Where the files of a place are. Safe for several threads.

    Args:
        first: The URL of a file from which redirects lead on.
        clock: Monotonic seconds.
    """

    def __init__(
        self, first: Callable[[str], Url], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first = first
        self._clock = clock
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}

    def target(self, name: str, headers: Callable[[Url], Mapping[str, str]]) -> FoundTarget:
        """The request for a file, at the place that is known now.

        Args:
            name: The file.
            headers: Those for a server: credentials are for one of them only.
        """
        with self._lock:
            place = self._places.get(name)
        place = place or Place(self._first(name))
        url = place.url
        return FoundTarget(url.scheme, url.host, url.port, url.target, headers(url), name, place)

    def again(self, refusal: Refusal) -> Again | None:
        """What a refusal means for where the file is.

        Returns:
            That it is to be asked for elsewhere; None where the refusal stands.

        Raises:
            SourceProtocol: It redirects to where nobody should go.
        """
        target = refusal.target
        assert isinstance(target, FoundTarget)
        place = target.place
        if refusal.status in _STATUSES:
            url = _follow(refusal, place)
            since = self._clock()
            self._move(target, Place(url, place.hops + 1, since, place.renewed))
            return Again("it was redirected", at_once=True)
        if place.hops and refusal.status in _EXPIRED:
            if place.renewed and self._clock() - place.since < _FRESH_S:
                return None
            self._move(target, Place(self._first(target.name), renewed=True))
            return Again(f"{place.url.server}, where it was redirected, refused it", at_once=True)
        return None

    def _move(self, target: FoundTarget, place: Place) -> None:
        """Unless another thread has found a newer place meanwhile: then that one is asked."""
        with self._lock:
            known = self._places.get(target.name)
            if known is target.place or (known is None and not target.place.hops):
                self._places[target.name] = place


def _follow(refusal: Refusal, place: Place) -> Url:
    location = refusal.headers.get("location")
    if location is None:
        raise SourceProtocol(
            "a redirect does not say where to",
            where=refusal.what,
            expected="a Location header",
            got=f"status {refusal.status} without one",
        )
    if place.hops >= _MAX_HOPS:
        raise SourceProtocol(
            "it is redirected again and again",
            where=refusal.what,
            expected=f"at most {_MAX_HOPS} redirects",
            got=f"one more, by {place.url.server}",
        )
    try:
        url = place.url.join(location)
    except ValueError as error:
        raise SourceProtocol(
            f"it is redirected to a URL that cannot be asked: {error}",
            where=refusal.what,
            got=f"a redirect by {place.url.server}",
        ) from None
    if place.url.scheme == "https" and url.scheme == "http":
        raise SourceProtocol(
            "it is redirected from https to http, where anybody could change it",
            where=refusal.what,
            expected="https all the way",
            got=f"a redirect to {url.server}",
            hint="Ask whoever runs that server, or give the URL that it redirects to.",
        )
    return url
