"""From what a user asked for to a load that follows peers."""

from __future__ import annotations

from coldframe.loader.loads.chain import Places
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.peers.directory import open_directory
from coldframe.loader.peers.following import Following
from coldframe.loader.peers.node import Node
from coldframe.loader.sources.location import Peer
from coldframe.loader.sources.opening import open_peer
from coldframe.loader.throttle import Throttle
from coldframe.loader.web.peer import PeerOrigin
from coldframe.loader.web.peer_talk import PeerTalk

__all__ = ["follow", "told_address"]

_ANY = ("0.0.0.0", "[::]")


def follow(
    options: LoadOptions,
    node: Node,
    throttle: Throttle | None,
    fallback: Places,
    served_at: str | None,
) -> Following:
    """The peers of a load, and what stands behind them.

    Args:
        options: What to load; `peers` and `peers_from` say where peers may be.
        node: This one.
        throttle: A limit on what comes over a network.
        fallback: The places to load from where no peer can be.
        served_at: `HOST:PORT` where peers are served here, or None.

    Raises:
        RequestError: One of the peers is none.
        SourceCredentials: The token is none that could be sent.
    """

    def open_one(peer: Peer, fingerprint: str | None) -> PeerOrigin:
        return open_peer(peer, fingerprint, throttle)

    return Following(
        open_directory(options.peers, options.peers_from),
        node,
        PeerTalk(),
        open_one,
        fallback,
        serves=told_address(served_at),
    )


def told_address(served_at: str | None) -> str | None:
    """Where we serve, as others are told: only the port where that is at every address of ours.

    The peer that hears it knows at which of them it hears us.
    """
    if served_at is None:
        return None
    host, _, port = served_at.rpartition(":")
    return f":{port}" if host in _ANY else served_at
