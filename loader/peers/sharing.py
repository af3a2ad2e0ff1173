"""A load's arena given to peers while it fills, and for as long as the replica lives."""

from __future__ import annotations

from collections.abc import Callable

from coldframe.loader.arena import Reservation, Segment
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.companions import COMPANIONS
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.checkpoints.seal import SEAL_NAME
from coldframe.loader.errors import ColdframeError, PlatformError, SourceNotFound
from coldframe.loader.memory import HostMemory, Memory
from coldframe.loader.peers.listener import listen
from coldframe.loader.peers.node import Node
from coldframe.loader.peers.server import PeerServer
from coldframe.loader.peers.serving import Offer
from coldframe.loader.sources.base import Source

__all__ = ["Sharing"]


class Sharing:
    """The server of peers, for one load.

    Args:
        address: Where it listens, `HOST:PORT`.
        token: What peers must send, or None: then only this machine may ask.
        node: What is told of this replica.

    Raises:
        PlatformError: It cannot listen there, or may not without a token.
    """

    def __init__(self, address: str, token: str | None, node: Node) -> None:
        host, _, port = address.rpartition(":")
        if not port.isdecimal():
            raise PlatformError(
                "peers cannot be served at this address",
                where="--serve-peers",
                expected="HOST:PORT",
                got=address,
                hint="Give a host and a port, such as 0.0.0.0:7000; port 0 takes any.",
            )
        self._server = PeerServer(listen(host.strip("[]"), int(port)), token, node=node)
        self._offer: Offer | None = None
        self._shards: list[str] = []
        self._mapped: Reservation | None = None

    @property
    def address(self) -> str:
        """Where it listens, `HOST:PORT`."""
        host, port = self._server.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def offer(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        memory: Memory | list[Segment],
        read_small: Callable[[str], bytes],
        source: Source,
    ) -> None:
        """Serves what is being loaded, from now on.

        Args:
            checkpoint: The checkpoint.
            plan: Where its bytes go.
            memory: The arena, or the files that are mapped in its place.
            read_small: A small file's content; may wait for it.
            source: Where bytes come from that are not in the arena.
        """
        if isinstance(memory, list):
            self._mapped = Reservation(plan.arena_bytes)
            self._mapped.attach(memory)
            memory = HostMemory(self._mapped.view())
        self._shards = [shard.name for shard in checkpoint.shards]
        index = {shard.name: number for number, shard in enumerate(checkpoint.shards)}

        def small(name: str, limit: int) -> bytes:
            if name == SEAL_NAME and checkpoint.seal is not None:
                return checkpoint.seal.encode()
            if name not in COMPANIONS:
                raise SourceNotFound("a peer gives only what a start needs", where=name)
            return read_small(name)

        self._offer = Offer(
            checkpoint,
            plan,
            memory,
            headers=checkpoint.headers,
            read_small=small,
            read_rest=lambda name, at, buffer: source.read_into(index[name], at, [buffer]),
            sealed=checkpoint.seal is not None,
        )
        self._server.offer(self._offer)

    def arrived(self, shard: int, start: int, stop: int) -> None:
        """Some bytes of a shard are in."""
        if self._offer is not None:
            self._offer.gate.arrived(self._shards[shard], start, stop)

    def ready(self, stage: int) -> None:
        """A stage is in."""
        if self._offer is not None:
            self._offer.gate.ready(stage)

    def end(self, error: ColdframeError | None) -> None:
        """The load is over."""
        if error is not None:
            self._server.fail(error)
        elif self._offer is not None:
            self._offer.gate.end(None)

    def moved(self, segments: list[Segment]) -> None:
        """The bytes of files that were mapped are elsewhere now, at the same arena offsets."""
        if self._mapped is not None:
            self._mapped.attach(segments)

    def close(self) -> None:
        """Ends all connections; then nobody reads the arena here any more."""
        self._server.close()
        if self._mapped is not None:
            self._mapped.close()
