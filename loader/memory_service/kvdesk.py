"""The memory service's desk for KV: the arena of blocks, and the messages that move them about.

Messages in:  `kv`, `watch`, `discard` (from the owner), `open`, `release` (from gateways),
`assign`, `publish`, `claim`, `drop`, `finish`, `renew` (from workers), and `bring` without a ticket
(likewise).
Messages out: `sized`, `kv_keys` (to the owner), `kv`, `kv_grown`, `kv_shrunk`, `assigned`,
`claimed`, `brought`, `dropped`, `available` (to workers).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.errors import ColdframeError, ReplicaError, TransferRefused
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.memory_service.reporter import Reporter

# What has the blocks is imported when they are sized: weights are on their way by then.
if TYPE_CHECKING:
    from coldframe.loader.kv.backing import KvBacking
    from coldframe.loader.kv.books import KvBooks
    from coldframe.loader.kv.discard import KvDiscard
    from coldframe.loader.kv.ledger import Blocks, KvUsage
    from coldframe.loader.kv.options import KvStoreOptions
    from coldframe.loader.kv.tally import StoreUsage

__all__ = ["KvDesk"]

Bring = Callable[[str, int, Sequence[int], int, Arena, Callable[[bool], None]], None]
"""See `LoadBeside.bring`."""


class _Kv(NamedTuple):
    """What there is once the owner has said how large blocks are."""

    books: KvBooks
    backing: KvBacking
    discard: KvDiscard


class KvDesk:
    """Answers every message that is about KV blocks; see `BlockLedger` for the rules.

    Args:
        reactor: The loop.
        reporter: Tells why there can be no arena.
        device: Where the blocks are to lie.
    """

    def __init__(self, reactor: Reactor, reporter: Reporter, device: Callable[[], Device]) -> None:
        self._reactor = reactor
        self._reporter = reporter
        self._device = device
        self._kv: _Kv | None = None
        self._waits_for_weights: Callable[[], None] | None = None
        self._weights_lie = False
        self._known = False
        self._identity: str | None = None
        self._proven = False
        self._lingering: deque[tuple[float, str]] = deque()
        """Workers that are gone while work of theirs may still be under way, and until when."""
        self._watcher: Connection | None = None
        """Who is told which keys come and go."""
        self.is_written: Callable[[Connection, str], bool] = lambda *_: False
        """Asked whether blocks that a worker lets go of are written to by somebody else, who lets
        them go when that ends."""
        self.on_released: Callable[[str], None] = lambda _: None
        """Told of each request that has ended."""

    @property
    def arena(self) -> Arena | None:
        """Where the blocks are, once there are any."""
        return None if self._kv is None else self._kv.backing.arena

    def existing_arena(self) -> Arena:
        """The same, for who gives KV to others or takes it from them.

        Raises:
            TransferRefused: There is none yet.
        """
        if self.arena is None:
            raise TransferRefused("there is no KV yet")
        return self.arena

    @property
    def block_bytes(self) -> int:
        """Of one block."""
        return 0 if self._kv is None else self._kv.backing.block_bytes

    def usage(self) -> KvUsage:
        """What the ledger counts; nothing before the arena."""
        from coldframe.loader.kv.ledger import KvUsage

        return KvUsage() if self._kv is None else self._kv.books.ledger.usage

    def store_usage(self) -> StoreUsage:
        """What the store counts; nothing where there is none."""
        from coldframe.loader.kv.tally import StoreUsage

        return StoreUsage() if self._kv is None else self._kv.books.store_usage()

    # -- the arena -------------------------------------------------------------------------------

    def on_kv(
        self,
        connection: Connection,
        block_bytes: int,
        blocks: int | None,
        lease_s: float,
        store: dict[str, Any] | None = None,
        room: dict[str, Any] | None = None,
    ) -> None:
        """Makes the arena and offers it to every worker, as soon as the device is up.

        Requests may come from now on; they get blocks then.

        Args:
            connection: The owner.
            block_bytes: Of one block.
            blocks: How many; None where `room` says it (`KvRoom`), once the weights have theirs.
            lease_s: See `BlockLedger`.
            store: Where KV is kept that leaves the arena (`KvStoreOptions`), if anywhere.
            room: See `blocks`.
        """
        connection.require_owner("sizes the KV")
        if self._kv is not None:
            raise ReplicaError("the KV has been sized already")
        from coldframe.loader.kv.backing import KvBacking, blocks_that_fit
        from coldframe.loader.kv.books import KvBooks
        from coldframe.loader.kv.discard import KvDiscard
        from coldframe.loader.kv.options import KvStoreOptions
        from coldframe.loader.kv.room import KvRoom

        device = self._device()
        backing = KvBacking(self._reactor, block_bytes)
        books = KvBooks(lease_s, backing.grow)
        books.ledger.pool.blocks = blocks or 0
        self._kv = kv = _Kv(books, backing, KvDiscard(books, backing, self._reactor.post))
        if self._watcher is not None:
            books.ledger.pool.watch()
        kept = None if store is None else KvStoreOptions.from_wire(store)

        def up() -> None:
            try:
                count = blocks
                if count is None:
                    count = blocks_that_fit(device, KvRoom.from_wire(room or {}), block_bytes)
                    sized = {"type": "sized", "block_bytes": block_bytes, "blocks": count}
                    self._reactor.send(self._reactor.owner, sized)
                self._make_arena(kv, device, count, kept)
            except ColdframeError as error:
                self._reporter.fail(error)

        if blocks is None and not self._weights_lie:
            self._waits_for_weights = up
        elif device.start(lambda: self._reactor.post(up)):
            up()

    def weights_lie(self) -> None:
        """The weights have their memory; what is left may become KV."""
        self._weights_lie = True
        up, self._waits_for_weights = self._waits_for_weights, None
        if up is not None:
            up()

    def _make_arena(
        self, kv: _Kv, device: Device, blocks: int, store: KvStoreOptions | None
    ) -> None:
        kv.books.ledger.pool.blocks = blocks
        arena = kv.backing.open(device, blocks)
        kv.books.ledger.pool.backed = kv.backing.grow(1)  # the first request need not wait for it
        if store is not None:
            kv.books.open_store(
                *(store, arena, kv.backing.block_bytes, self._reactor.post, self._tell_available)
            )
            if self._known:
                kv.books.open_disk(self._identity)
            if self._proven:
                kv.books.may_write()
        kv.backing.offer()
        self._tell_available()

    def model_is(self, identity: str | None) -> None:
        """The weights are known, as far as they can be told from all others."""
        self._known, self._identity = True, identity
        if self._kv is not None:
            self._kv.books.open_disk(identity)

    def weights_are_proven(self) -> None:
        """They are in, and those that they are said to be: KV that is made of them may be kept."""
        self._proven = True
        if self._kv is not None:
            self._kv.books.may_write()

    def greet(self, worker: Connection) -> None:
        """Gives the arena to a worker, if it stands already."""
        if self._kv is not None:
            self._kv.backing.greet(worker)

    def on_discard(self, connection: Connection) -> None:
        """The replica is parked: the memory of all blocks goes, as soon as no worker has any."""
        connection.require_owner("gives memory back")
        if self._kv is not None:
            self._kv.discard.wish()

    def close(self) -> None:
        """Writes what is to be kept and is not written yet, in a bounded time."""
        # Where there is a store, its readers may be at the arena still.
        if self._kv is not None and not self._kv.books.close() and self.arena is not None:
            self.arena.close()

    # -- who comes and goes ----------------------------------------------------------------------

    def gone(self, connection: Connection) -> None:
        """A connection has ended, and with it what it held and whose requests it kept alive."""
        if connection is self._watcher:
            self._watcher = None
        if self._kv is None:
            return
        self._kv.books.ledger.gateway_gone(connection.key)
        if connection.busy:
            return  # what is written to its blocks is waited for
        lingers_s = 0.0 if self.arena is None else self.arena.lingers_s
        if lingers_s and connection.attached:
            self._lingering.append((time.monotonic() + lingers_s, connection.key))
        else:
            self._kv.books.worker_gone(connection.key)
        self._kv.books.tidy()
        self._tell_available()

    def tick(self) -> None:
        """Ends the leases that have run out, and what has lingered."""
        if self._kv is None:
            return
        while self._lingering and self._lingering[0][0] <= time.monotonic():
            self._kv.books.worker_gone(self._lingering.popleft()[1])
            self._tell_available()
        self._kv.books.tidy()
        if self._kv.books.ledger.expire(time.monotonic()):
            self._tell_available()

    def on_watch(self, connection: Connection) -> None:
        """Tells the owner from now on which keys are published, and which are forgotten."""
        connection.require_owner("watches keys")
        self._watcher = connection
        if self._kv is not None:
            self._kv.books.ledger.pool.watch()

    def tell_changes(self) -> None:
        """Tells who watches; to be called when messages have been answered."""
        if self._watcher is None or self._kv is None:
            return
        changes = self._kv.books.ledger.pool.take_changes()
        if changes:
            stored = [key for key, published in changes.items() if published]
            removed = [key for key, published in changes.items() if not published]
            told = {"type": "kv_keys", "stored": stored, "removed": removed}
            self._reactor.send(self._watcher, told)

    # -- requests --------------------------------------------------------------------------------

    def on_open(self, connection: Connection, request: str) -> None:
        self._books.ledger.open(request, connection.key)
        self._tell_available()  # a worker may have asked before

    def on_release(self, connection: Connection, request: str) -> None:
        self._books.ledger.release(request)
        self.on_released(request)
        self._books.tidy()
        self._tell_available()

    def on_assign(
        self, connection: Connection, request: str, attempt: int, count: int, keys: list[str]
    ) -> None:
        got = self.assign_for(connection, request, attempt, count, keys)
        if got is None:
            body: dict[str, Any] = {"type": "assigned", "blocks": None, "reused": 0}
            backing = self._opened.backing
            if backing.full is not None and self._books.never(connection.key, request, attempt):
                body["error"] = backing.refusal(count).to_wire()
            self._reactor.send(connection, body)
            return
        self._books.used(keys[: got.reused])
        body = {"type": "assigned", "blocks": got.blocks, "reused": got.reused}
        self._reactor.send(connection, body)
        self._tell_available()  # a new attempt frees what the old one has left

    def on_publish(self, connection: Connection, request: str, keys: list[str]) -> None:
        self._books.check_keys(keys, connection.key)
        self._books.publish(connection.key, request, keys)

    def on_claim(self, connection: Connection, request: str, attempt: int) -> None:
        blocks = self.claim_for(connection.key, request, attempt)
        self._reactor.send(connection, {"type": "claimed", "blocks": blocks})

    def on_drop(self, connection: Connection, request: str) -> None:
        self._books.ledger.drop(connection.key, request, time.monotonic())
        self._reactor.send(connection, {"type": "dropped"})
        self._tell_available()

    def on_finish(self, connection: Connection, request: str) -> None:
        if self.is_written(connection, request):
            return
        self._books.ledger.finish(connection.key, request)
        self._tell_available()

    def on_renew(self, connection: Connection, request: str) -> None:
        self._books.ledger.renew(request, time.monotonic())

    # -- KV that is brought from elsewhere -------------------------------------------------------

    def bring(
        self,
        connection: Connection,
        bring: Bring,
        request: str,
        attempt: int,
        count: int,
        written: int,
        keys: list[str],
    ) -> None:
        """Gives a request blocks, and answers once its KV has been brought into them.

        Args:
            connection: The worker, which waits.
            bring: See `LoadBeside.bring`.
            request: Whose.
            attempt: The worker's.
            count: How many blocks.
            written: How many of them are to hold KV.
            keys: See `on_assign`.
        """
        got = self.assign_for(connection, request, attempt, count, keys)
        if got is None or self.arena is None:
            body = {"type": "brought", "blocks": None, "reused": 0, "lost": False}
            self._reactor.send(connection, body)
            return
        connection.busy += 1

        def done(there: bool) -> None:
            self._reactor.post(lambda: self._brought(connection, request, got, there))

        bring(request, attempt, got.blocks[:written], got.reused, self.arena, done)

    def _brought(self, connection: Connection, request: str, got: Blocks, there: bool) -> None:
        connection.busy -= 1
        if connection.gone:
            self.gone(connection)
            return
        if not there:
            self._books.ledger.finish(connection.key, request)
        blocks = got.blocks if there else None
        body = {"type": "brought", "blocks": blocks, "reused": got.reused, "lost": not there}
        self._reactor.send(connection, body)
        self._tell_available()

    def assign_for(
        self, connection: Connection, request: str, attempt: int, count: int, keys: list[str]
    ) -> Blocks | None:
        """Gives a worker a request's blocks, for itself or somebody else to write to.

        Where there are none at the moment, it is told when there may be.
        """
        self._opened.discard.asked()
        self._books.check_keys(keys, connection.key)
        got = self._books.assign(connection.key, request, attempt, count, keys)
        connection.waits_for_blocks = got is None
        return got

    def claim_for(self, holder: str, request: str, attempt: int) -> list[int] | None:
        """The blocks of a request that was handed over, for a holder that may be no worker."""
        return self._books.ledger.claim(holder, request, attempt)

    def let_go(self, holder: str, request: str, *, leased: bool = False) -> None:
        """Such a holder, or a worker, has no more use for them.

        Args:
            holder: Who had them.
            request: Whose they are.
            leased: Whether another worker may claim them still.
        """
        if leased:
            self._books.ledger.drop(holder, request, time.monotonic())
        else:
            self._books.ledger.finish(holder, request)
        self._tell_available()

    @property
    def _opened(self) -> _Kv:
        if self._kv is None:
            raise ReplicaError("there is no KV yet")
        return self._kv

    @property
    def _books(self) -> KvBooks:
        return self._opened.books

    def _tell_available(self) -> None:
        if self._kv is not None:
            self._kv.discard.step()
        for connection in self._reactor.connections:
            if connection.waits_for_blocks:
                connection.waits_for_blocks = False
                self._reactor.send(connection, {"type": "available"})
