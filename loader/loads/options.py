"""What to load, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LoadOptions"]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What to load, and how.

    Args:
        model: A directory, or another place as `sources.location.parse_location` takes it.
        sources: Places to try before that one, in their order.
        copy: Never map files in place.
        verify: Hold the bytes against the checkpoint's seal, where it has one.
        throttle: Bytes per second at most, or None; implies `copy`.
        threads: Readers; None leaves it to the source.
        layout: How the arena is laid out; None takes what measures best for the source.
        cache: A directory that keeps what comes over a network, or None.
        cache_bytes: How much it may keep.
        peers: `HOST:PORT` of nodes that may have the model: asked before any other place.
        peers_from: Where more of them are found; see `peers.directory`.
        peer_readers: How many may read from here at once; others are sent on to those.
        serve_peers: `HOST:PORT` where the arena is served to peers, or None.
        peer_token: What they must send.
        device: Where the weights go, as `devices.open_device` takes it.
        beside: The socket of another device's memory service, to take weights and KV from; None
            loads them.
        rank: The tensor-parallel rank whose slices are loaded, from 0.
        ranks: How many of them there are; 1 loads all of the model.
    """

    model: str
    sources: tuple[str, ...] = ()
    copy: bool = False
    verify: bool = True
    throttle: float | None = None
    threads: int | None = None
    layout: str | None = None
    cache: str | None = None
    cache_bytes: int = 0
    peers: tuple[str, ...] = ()
    peers_from: tuple[str, ...] = ()
    peer_readers: int = 1
    serve_peers: str | None = None
    peer_token: str | None = None
    device: str = "cpu"
    beside: str | None = None
    rank: int = 0
    ranks: int = 1

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_wire(data: dict[str, Any]) -> LoadOptions:
        lists = ("sources", "peers", "peers_from")
        return LoadOptions(**{**data, **{name: tuple(data.get(name, ())) for name in lists}})
