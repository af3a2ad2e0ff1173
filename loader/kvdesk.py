"""The memory service's desk for KV: the arena of blocks, and the messages that move them about."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from coldframe.loader.arena import PAGE, Reservation, Segment, round_up
from coldframe.loader.connection import Connection
from coldframe.loader.devices import Device
from coldframe.loader.errors import ArenaError, ReplicaError
from coldframe.loader.kv_options import KvStoreOptions
from coldframe.loader.kvtally import StoreUsage
from coldframe.loader.ledger import BlockLedger, Blocks, KvUsage

# What only those need who keep KV.
if TYPE_CHECKING:
    from coldframe.loader.kvprepare import KvPreparer
    from coldframe.loader.kvstore import KvStore

__all__ = ["KvDesk"]

_DRAIN_S = 2.0
"""How long it may take to write what is not written yet, before memory is given back."""


class KvDesk:
    """Answers every message that is about KV blocks; see `BlockLedger` for the rules.

    Args:
        device: Where the blocks lie.
        send: Sends a message to a connection.
        connections: All that there are.
        post: Has something done by the loop; any thread may call it.
    """

    def __init__(
        self,
        device: Device,
        send: Callable[..., None],
        connections: Callable[[], Iterable[Connection]],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._device = device
        self._send = send
        self._connections = connections
        self._post = post
        self._ledger: BlockLedger | None = None
        self._offer: tuple[dict[str, Any], Segment] | None = None
        self._discarding = False
        self._leaving = False
        """Whether the store is saving what is about to be discarded."""
        self._asked = False
        """Whether a request has come meanwhile."""
        self._store: KvStore | None = None
        self._preparer: KvPreparer | None = None
        self._known = False
        self._identity: str | None = None
        self._proven = False

    def open_arena(
        self,
        block_bytes: int,
        blocks: int,
        lease_s: float,
        store: dict[str, Any] | None = None,
    ) -> None:
        """Makes the arena and offers it to every worker.

        Args:
            block_bytes: Of one block.
            blocks: How many.
            lease_s: See `BlockLedger`.
            store: Where KV is kept that leaves the arena (`KvStoreOptions`), if anywhere.

        Raises:
            DeviceError: There is no memory for it.
            ReplicaError: There is one already.
        """
        if self._offer is not None:
            raise ReplicaError("the KV has been sized already")
        size = round_up(block_bytes * blocks, PAGE)
        fd = self._device.allocate("kv", size, now=False)
        self._ledger = BlockLedger(blocks, lease_s)
        segment = Segment(fd, 0, size, 0, True)
        if store is not None:
            self._open_store(KvStoreOptions.from_wire(store), segment, block_bytes)
        body = {
            "type": "kv",
            "block_bytes": block_bytes,
            "blocks": blocks,
            "segment": segment.to_wire(),
        }
        self._offer = (body, segment)
        for connection in list(self._connections()):
            if connection.attached:
                self.greet(connection)

    def _open_store(self, options: KvStoreOptions, segment: Segment, block_bytes: int) -> None:
        from coldframe.loader.kvprepare import KvPreparer
        from coldframe.loader.kvstore import KvStore

        assert self._ledger is not None
        mapped = Reservation(segment.length)
        mapped.attach([segment])
        self._store = KvStore(options, mapped.view(), block_bytes)
        self._preparer = KvPreparer(
            self._ledger, self._store, self._post, self._tell_available, self._ledger.lease_s
        )
        if self._known:
            self._store.open_disk(self._identity)
        if self._proven:
            self._store.may_write()

    def model_is(self, identity: str | None) -> None:
        """The weights are known, as far as they can be told from all others."""
        self._known, self._identity = True, identity
        if self._store is not None:
            self._store.open_disk(identity)

    def weights_are_proven(self) -> None:
        """They are in, and those that they are said to be: KV that is made of them may be kept."""
        self._proven = True
        if self._store is not None:
            self._store.may_write()

    def close(self) -> None:
        """Writes what is to be kept and is not written yet, in a bounded time."""
        if self._store is not None:
            self._store.close(_DRAIN_S)

    def greet(self, worker: Connection) -> None:
        """Gives the arena to a worker, if it stands already."""
        if self._offer is not None:
            body, segment = self._offer
            self._send(worker, body, (segment.fd,))

    def usage(self) -> KvUsage:
        """What the ledger counts; nothing before the arena."""
        return KvUsage() if self._ledger is None else self._ledger.usage

    def store_usage(self) -> StoreUsage:
        """What the store counts; nothing where there is none."""
        return StoreUsage() if self._store is None else self._store.usage()

    def discard(self) -> None:
        """Gives the memory of all blocks back, as soon as no worker has any and until one is asked.

        Raises:
            DeviceError: It cannot be given back.
        """
        self._discarding = True
        self._try_to_discard()

    def _try_to_discard(self) -> None:
        if not self._discarding or self._leaving or self._ledger is None:
            return
        if self._ledger.free < self._ledger.blocks:
            return
        if self._store is None:
            self._discard_now()
        else:
            self._leaving, self._asked = True, False
            post, left = self._post, self._left
            self._store.leave_arena(self._ledger.kept, _DRAIN_S, lambda: post(left))

    def _left(self) -> None:
        """The store has what it wants, unless requests have come meanwhile."""
        self._leaving = False
        if self._asked:
            self._try_to_discard()
        elif self._discarding:
            self._discard_now()

    def _discard_now(self) -> None:
        assert self._ledger is not None
        assert self._offer is not None
        if self._ledger.reset():
            self._discarding = False
            if self._store is not None:
                self._store.arena_lost()
            _, segment = self._offer
            self._device.discard(segment.fd, segment.length)

    def gone(self, connection: Connection) -> None:
        """A connection has ended, and with it what it held and whose requests it kept alive."""
        if self._ledger is None:
            return
        if self._preparer is not None:
            self._preparer.worker_gone(connection.key)
        self._ledger.worker_gone(connection.key, time.monotonic())
        self._ledger.gateway_gone(connection.key)
        if self._preparer is not None:
            self._preparer.tidy()
        self._tell_available()

    def tick(self) -> None:
        """Ends the leases that have run out."""
        if self._preparer is not None:
            self._preparer.tidy()
        if self._ledger is not None and self._ledger.expire(time.monotonic()):
            self._tell_available()

    # -- messages --------------------------------------------------------------------------------

    def on_open(self, connection: Connection, request: str) -> None:
        self._books.open(request, connection.key)
        self._tell_available()  # a worker may have asked before

    def on_release(self, connection: Connection, request: str) -> None:
        self._books.release(request)
        if self._preparer is not None:
            self._preparer.tidy()
        self._tell_available()

    def on_assign(
        self, connection: Connection, request: str, attempt: int, count: int, keys: list[str]
    ) -> None:
        self._discarding, self._asked = False, True
        self._check_keys(connection, keys)
        got = self._assign(connection.key, request, attempt, count, keys)
        connection.waits_for_blocks = got is None
        if got is None:
            self._send(connection, {"type": "assigned", "blocks": None, "reused": 0})
            return
        if self._store is not None:
            self._store.forgotten(got.forgotten)
            self._store.used(keys[: got.reused])
        self._send(connection, {"type": "assigned", "blocks": got.blocks, "reused": got.reused})
        self._tell_available()  # a new attempt frees what the old one has left

    def _assign(
        self, worker: str, request: str, attempt: int, count: int, keys: list[str]
    ) -> Blocks | None:
        asked = (worker, request, attempt, count, keys)
        preparer = self._preparer
        if preparer is None:
            return self._books.assign(*asked)
        if not preparer.may_assign(*asked):
            return None
        got = self._books.assign(*asked)
        if got is None and self._books.may_assign(worker, request, attempt) and preparer.give_way():
            got = self._books.assign(*asked)
        return got

    def on_publish(self, connection: Connection, request: str, keys: list[str]) -> None:
        self._check_keys(connection, keys)
        new = self._books.publish(connection.key, request, keys)
        if self._store is not None:
            self._store.published(new)

    def on_claim(self, connection: Connection, request: str, attempt: int) -> None:
        blocks = self._books.claim(connection.key, request, attempt)
        self._send(connection, {"type": "claimed", "blocks": blocks})

    def on_drop(self, connection: Connection, request: str) -> None:
        self._books.drop(connection.key, request, time.monotonic())
        self._send(connection, {"type": "dropped"})
        self._tell_available()

    def on_finish(self, connection: Connection, request: str) -> None:
        self._books.finish(connection.key, request)
        self._tell_available()

    def on_renew(self, connection: Connection, request: str) -> None:
        self._books.renew(request, time.monotonic())

    def _check_keys(self, connection: Connection, keys: list[str]) -> None:
        """Keys name files, and this process may have more rights than whoever sends them.

        Raises:
            ArenaError: One of them is none.
        """
        if self._store is not None and not self._store.are_keys(keys):
            raise ArenaError("a worker gave a key of KV that is none", where=connection.key)

    @property
    def _books(self) -> BlockLedger:
        if self._ledger is None:
            raise ReplicaError("there is no KV yet")
        return self._ledger

    def _tell_available(self) -> None:
        self._try_to_discard()
        for connection in list(self._connections()):
            if connection.waits_for_blocks:
                connection.waits_for_blocks = False
                self._send(connection, {"type": "available"})
