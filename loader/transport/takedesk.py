"""The memory service's desk for KV that comes from other replicas.

Messages in:  `bring` with a ticket (from workers; see `KvDesk.bring` for that without).
Messages out: `brought`, `fetched`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from coldframe.loader.devices.base import Device
from coldframe.loader.errors import ColdframeError, TransferRefused
from coldframe.loader.kv.ledger import Blocks
from coldframe.loader.kv.runs import runs_of
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.kvdesk import KvDesk
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.transport.base import DEFAULT_WAYS, Taker, Ticket, Transfer
from coldframe.loader.transport.registry import open_takers
from coldframe.loader.transport.secret import read_secret
from coldframe.loader.transport.takes import Take, TakeThreads, ways_from
from coldframe.loader.transport.usage import TakeUsage

if TYPE_CHECKING:
    from coldframe.loader.transport.nixl import NixlAgent

__all__ = ["TakeDesk"]


class TakeDesk:
    """Takes; all calls come from the service's loop.

    Args:
        reactor: The loop.
        kv: Has the blocks.
        device: Where they are.

    Attributes:
        names: The ways that may be gone, in the order in which they are tried.
        keyed: Whether blocks from other hosts are held against a hash of theirs.
        agent: Takes what comes by NIXL, where it may come that way.
        usage: What has become of the tickets that workers came with, so far.
    """

    def __init__(self, reactor: Reactor, kv: KvDesk, device: Callable[[], Device]) -> None:
        self._reactor = reactor
        self._kv = kv
        self._device = device
        self.names: Sequence[str] = DEFAULT_WAYS
        self.keyed = False
        self.agent: NixlAgent | None = None
        self.usage = TakeUsage()
        self._takers: dict[str, Taker] | None = None
        self._takes: dict[tuple[str, str], Take] = {}
        self._threads = TakeThreads()
        kv.is_written = self._is_written

    def close(self) -> None:
        """Breaks off what is under way, and waits until nobody looks at the arena."""
        for take in self._takes.values():
            take.abandon()
        self._threads.close()
        for taker in (self._takers or {}).values():
            taker.close()

    def gone(self, connection: Connection) -> None:
        """A connection has ended: nobody waits for what it has brought."""
        for take in list(self._takes.values()):
            if take.connection is connection:
                self._abandon(take)

    def bring(
        self,
        connection: Connection,
        ticket: Any,
        request: str,
        attempt: int,
        count: int,
        written: int,
        keys: list[str],
    ) -> None:
        """Brings a request's KV into blocks here; the worker asks again once it is there.

        Args:
            connection: The worker.
            ticket: For the KV.
            request: Whose.
            attempt: The worker's.
            count: How many blocks it is to have.
            written: How many of them are to hold KV.
            keys: Of its first blocks: those that are published here need not be brought.
        """
        known = self._takes.get((connection.key, request))
        if known is not None and known.running:
            self._answer(connection, None, pending=True)
            return
        if known is not None:
            del self._takes[known.key]
            if known.attempt == attempt:
                if known.error is None:
                    self.usage = self.usage.with_taken(known.nbytes)
                self._answer(connection, None if known.error else known.got, error=known.error)
                return
        try:
            wanted = Ticket.from_wire(ticket)
            self._check(wanted, written)
            ways = ways_from(wanted, self._open_takers(), self.names)
        except ColdframeError as error:
            self._answer(connection, None, error=error)
            return
        got = self._kv.assign_for(connection, request, attempt, count, keys)
        if got is None:
            self._answer(connection, None)
            return
        nbytes = max(0, written - got.reused) * self._kv.block_bytes
        take = Take(connection, request, attempt, got, nbytes)
        self._takes[take.key] = take
        connection.busy += 1
        runs = runs_of(got.blocks, got.reused, written)
        transfer = Transfer(wanted, runs, self._kv.existing_arena(), self._device())

        def done(error: ColdframeError | None) -> None:
            self._reactor.post(lambda: self._taken(take, error))

        self._threads.run(take, transfer, ways, done)
        self._answer(connection, None, pending=True)

    def _check(self, ticket: Ticket, written: int) -> None:
        size = self._kv.block_bytes
        if ticket.block_bytes != size or ticket.blocks < written:
            raise TransferRefused(
                "the sender's KV does not fit here",
                where=ticket.request,
                expected=f"{written} blocks of {size:,} bytes",
                got=f"{ticket.blocks} of {ticket.block_bytes:,}",
            )

    def _open_takers(self) -> dict[str, Taker]:
        if self._takers is None:
            self._takers = open_takers(
                *(self.names, self._device(), read_secret(), self.agent), keyed=self.keyed
            )
        return self._takers

    def _answer(
        self,
        connection: Connection,
        got: Blocks | None,
        *,
        pending: bool = False,
        error: ColdframeError | None = None,
    ) -> None:
        body: dict[str, Any] = {
            "type": "brought",
            "blocks": None if got is None else got.blocks,
            "reused": 0 if got is None else got.reused,
            "lost": error is not None,
            "pending": pending,
        }
        if error is not None:
            self.usage = self.usage.with_lost()
            body["error"] = error.to_wire()
        self._reactor.send(connection, body)

    def _taken(self, take: Take, error: ColdframeError | None) -> None:
        """A thread is through: nothing is written to the blocks any more."""
        connection = take.connection
        connection.busy -= 1
        take.running, take.error = False, error
        if connection.gone:
            self._takes.pop(take.key, None)
            self._kv.gone(connection)
            return
        if error is not None or take.abandoned:
            self._kv.let_go(connection.key, take.request)
        if take.abandoned:
            self._takes.pop(take.key, None)
            return
        self._reactor.send(connection, {"type": "fetched", "request": take.request})

    def _is_written(self, connection: Connection, request: str) -> bool:
        """Whether blocks that a worker lets go of are still written to; they go when that ends."""
        take = self._takes.get((connection.key, request))
        return take is not None and self._abandon(take)

    def _abandon(self, take: Take) -> bool:
        """Nobody waits for it any more. Whether something is written for it still."""
        take.abandon()
        if not take.running:
            del self._takes[take.key]
        return take.running
