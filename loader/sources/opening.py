"""From what a user wrote to a place that can be read: each kind of source, made when it is needed.

The kinds are imported when they are used: a start from a local directory must not wait for the
import of an HTTP client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from coldframe.loader.sources.base import Origin
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.location import (
    S3,
    Directory,
    Http,
    Hub,
    Location,
    Peer,
    parse_location,
)
from coldframe.loader.throttle import Throttle

if TYPE_CHECKING:
    from coldframe.loader.web.address import Address
    from coldframe.loader.web.limits import Limits
    from coldframe.loader.web.peer import PeerOrigin

__all__ = ["open_origin", "open_peer", "origins_of"]

_HURRY_S, _HURRIED_STALL_S = 2.0, 5.0
"""A place that has another one behind it is given up when it has refused or failed for so long, or
when a connection that stood is silent for so long."""
_ROW_S = 0.5
"""Likewise where it is a peer in a row, and others wait behind us."""


def origins_of(
    places: Sequence[str], throttle: Throttle | None = None, *, hurry_last: bool = False
) -> Iterator[Callable[[], Origin]]:
    """What makes each place, in their order.

    Args:
        places: As a user writes them: see `location.parse_location`.
        throttle: A limit on what comes over a network, shared by all of them.
        hurry_last: Whether something stands behind the last one, too. A place with something
            behind it is given up sooner.

    Raises:
        RequestError: One of them is nothing that could be a place. (All are looked at at once.)
    """
    locations = [parse_location(place) for place in places]
    last = len(locations) - 1
    return (
        partial(open_origin, at, throttle, hurry=number < last or hurry_last)
        for number, at in enumerate(locations)
    )


def open_origin(
    location: Location, throttle: Throttle | None = None, *, hurry: bool = False
) -> Origin:
    """The place that a location names. Nothing is asked of it yet.

    Args:
        location: The place.
        throttle: A limit on what comes over a network.
        hurry: Give up soon where nothing comes: somebody else can step in.

    Raises:
        SourceError: It cannot be addressed: no credentials, no such cached revision offline.
        PlatformError: A package that it needs is not installed.
    """
    match location:
        case Directory(path):
            return DirectoryOrigin(path)
        case Hub():
            from coldframe.loader.web.hub import HubAddress, find_cached

            cached = find_cached(location.repo, location.revision)
            if cached is not None:
                return DirectoryOrigin(cached)
            return _web(HubAddress(location), throttle, hurry, one_first=True)
        case S3():
            from coldframe.loader.web.s3 import s3_origin

            return s3_origin(location, throttle, limits=_limits(hurry))
        case Http():
            from coldframe.loader.web.http import HttpAddress

            return _web(HttpAddress(location), throttle, hurry)
        case Peer():
            from coldframe.loader.web.peer import peer_origin

            return peer_origin(location, throttle, limits=replace(_limits(hurry), hedges=0))


def open_peer(
    location: Peer, fingerprint: str | None, throttle: Throttle | None = None
) -> PeerOrigin:
    """A peer in a row of them: given up soon, and asked for pieces that can be handed on.

    Args:
        location: The peer.
        fingerprint: The checkpoint that it must serve.
        throttle: A limit on what comes over a network.

    Raises:
        SourceCredentials: The token is none that could be sent.
    """
    from coldframe.loader.web.peer import ROW_CONNECTIONS, peer_origin

    # One that refuses connections has died, and its weights with it.
    limits = replace(_limits(True), patience_s=_ROW_S)
    limits = replace(
        limits, hedges=0, first_connections=ROW_CONNECTIONS, connections=ROW_CONNECTIONS
    )
    return peer_origin(location, throttle, fingerprint=fingerprint, in_a_row=True, limits=limits)


def _limits(hurry: bool) -> Limits:
    from coldframe.loader.web.limits import Limits

    return (
        Limits(patience_s=_HURRY_S, connect_s=_HURRY_S, stall_s=_HURRIED_STALL_S)
        if hurry
        else Limits()
    )


def _web(
    address: Address, throttle: Throttle | None, hurry: bool, *, one_first: bool = False
) -> Origin:
    from coldframe.loader.web.origin import WebOrigin
    from coldframe.loader.web.ranges import RangeReader

    return WebOrigin(
        RangeReader(address, throttle=throttle, limits=_limits(hurry)), one_first=one_first
    )
