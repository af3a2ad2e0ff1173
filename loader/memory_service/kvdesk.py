"""The memory service's desk for KV: the arena of blocks, and the messages that move them about."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from coldframe.loader.arena import Segment
from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.errors import (
    ArenaError,
    ColdframeError,
    DeviceFull,
    ReplicaError,
    RequestError,
)
from coldframe.loader.kv.ledger import BlockLedger, Blocks, KvUsage
from coldframe.loader.kv.options import KvStoreOptions
from coldframe.loader.kv.room import KvRoom
from coldframe.loader.kv.tally import StoreUsage
from coldframe.loader.memory_service.connection import Connection

# What only those need who keep KV.
if TYPE_CHECKING:
    from coldframe.loader.kv.prepare import KvPreparer
    from coldframe.loader.kv.store import KvStore

__all__ = ["KvDesk"]

STEP_VARIABLE = "COLDFRAME_KV_STEP"
"""Names the bytes by which the arena grows at once, where it does."""
_STEP = 256 << 20
Bring = Callable[[str, int, Sequence[int], int, Arena, Callable[[bool], None]], None]
"""See `LoadBeside.bring`."""

_DRAIN_S = 2.0
"""How long it may take to write what is not written yet, before memory is given back."""


class KvDesk:
    """Answers every message that is about KV blocks; see `BlockLedger` for the rules.

    Args:
        send: Sends a message to a connection.
        connections: All that there are.
        post: Has something done by the loop; any thread may call it.
        fail: Told why there can be no arena.
        sized: Told `block_bytes` and `blocks` where the desk was left to say how many.
    """

    def __init__(
        self,
        send: Callable[..., None],
        connections: Callable[[], Iterable[Connection]],
        post: Callable[[Callable[[], None]], None],
        fail: Callable[[ColdframeError], None],
        sized: Callable[[dict[str, int]], None],
    ) -> None:
        self._send = send
        self._connections = connections
        self._post = post
        self._fail = fail
        self._sized = sized
        self._waits_for_weights: Callable[[], None] | None = None
        self._weights_lie = False
        self._ledger: BlockLedger | None = None
        step = os.environ.get(STEP_VARIABLE, "")
        self._step = int(step) if step.isascii() and step.isdecimal() else _STEP
        self._arena: Arena | None = None
        self._offer: dict[str, Any] = {}
        self._offered = False
        """Whether the workers have been told of the arena."""
        self._full: DeviceFull | None = None
        """Why the arena could not grow when it last should have."""
        self._lingering: deque[tuple[float, str]] = deque()
        """Workers that are gone while work of theirs may still be under way, and until when."""
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
        self._watcher: Connection | None = None
        """Who is told which keys come and go."""
        self.is_written: Callable[[Connection, str], bool] = lambda *_: False
        """Asked whether blocks that a worker lets go of are written to by somebody else, who lets
        them go when that ends."""
        self.on_released: Callable[[str], None] = lambda _: None
        """Told of each request that has ended."""

    def open_arena(
        self,
        device: Device,
        block_bytes: int,
        blocks: int | None,
        lease_s: float,
        store: dict[str, Any] | None = None,
        room: dict[str, Any] | None = None,
    ) -> None:
        """Makes the arena and offers it to every worker, as soon as the device is up.

        Requests may come from now on; they get blocks then.

        Args:
            device: Where the blocks lie.
            block_bytes: Of one block.
            blocks: How many; None where `room` says it (`KvRoom`), once the weights have theirs.
            lease_s: See `BlockLedger`.
            store: Where KV is kept that leaves the arena (`KvStoreOptions`), if anywhere.
            room: See `blocks`.

        Raises:
            ReplicaError: There is one already.
        """
        if self._ledger is not None:
            raise ReplicaError("the KV has been sized already")
        self._ledger = BlockLedger(blocks or 0, lease_s, self._grow)
        if self._watcher is not None:
            self._ledger.watch()
        self._offer = {"block_bytes": block_bytes}
        kept = None if store is None else KvStoreOptions.from_wire(store)

        def up() -> None:
            try:
                count = blocks
                if count is None:
                    count = self._count(device, KvRoom.from_wire(room or {}))
                self._make_arena(device, count, kept)
            except ColdframeError as error:
                self._fail(error)

        if blocks is None and not self._weights_lie:
            self._waits_for_weights = up
        elif device.start(lambda: self._post(up)):
            up()

    def weights_lie(self) -> None:
        """The weights have their memory; what is left may become KV."""
        self._weights_lie = True
        up, self._waits_for_weights = self._waits_for_weights, None
        if up is not None:
            up()

    def _count(self, device: Device, room: KvRoom) -> int:
        """How many blocks there is room for, beside the weights, which have theirs."""
        found, size = device.report(), self._offer["block_bytes"]
        count = room.nbytes(found.total, found.free, 0) // int(size)
        if count < 1:
            raise DeviceFull(
                "the weights leave no room for KV",
                where=device.name,
                expected=f"at least {size:,} bytes",
                got=f"{found.free:,} of {found.total:,} bytes free",
                hint="Take a smaller model or another device, or say how much with --kv-memory.",
            )
        self._sized({"block_bytes": size, "blocks": count})
        return count

    def _make_arena(self, device: Device, blocks: int, store: KvStoreOptions | None) -> None:
        assert self._ledger is not None
        block_bytes, self._ledger.blocks = self._offer["block_bytes"], blocks
        self._offer["blocks"] = blocks
        self._arena = arena = device.arena("kv", block_bytes * blocks, now=False)
        self._offer["size"] = arena.size
        self._ledger.backed = self._grow(1)  # the first request need not wait for it
        if store is not None:
            self._open_store(store, arena, block_bytes)
        self._offered = True
        for connection in self._workers():
            self.greet(connection)
        self._tell_available()

    def _workers(self) -> list[Connection]:
        return [connection for connection in self._connections() if connection.attached]

    def _grow(self, blocks: int) -> int:
        """Puts memory behind so many blocks from the first, as far as the device has any.

        Whoever gets one of them hears of it first: messages stay in their order.
        """
        arena, size = self._arena, self._offer["block_bytes"]
        if arena is None:
            return 0
        missing = blocks * size - arena.grown
        for step in (max(missing, min(self._step, arena.size - arena.grown)), missing):
            if missing <= 0:
                break
            try:
                segment = arena.grow(step)
            except DeviceFull as error:
                self._full = error
                continue
            self._full = None
            for connection in self._workers() if self._offered else []:
                self._send_grown(connection, segment)
            break
        return min(int(self._offer["blocks"]), arena.grown // int(size))

    def _send_grown(self, worker: Connection, segment: Segment) -> None:
        body = {"type": "kv_grown", "segment": segment.to_wire()}
        self._send(worker, body, (segment.fd,))

    def _open_store(self, options: KvStoreOptions, arena: Arena, block_bytes: int) -> None:
        from coldframe.loader.kv.prepare import KvPreparer
        from coldframe.loader.kv.store import KvStore

        assert self._ledger is not None
        self._store = KvStore(options, arena, block_bytes)
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
            self._store.close(_DRAIN_S)  # whose readers may be at the arena still
        elif self._arena is not None:
            self._arena.close()

    def greet(self, worker: Connection) -> None:
        """Gives the arena to a worker, if it stands already."""
        if self._arena is not None and self._offered:
            segments = self._arena.segments
            # The first of them with it, so that who has the arena has some memory, if there is any.
            body = {"type": "kv", **self._offer, "segments": [s.to_wire() for s in segments[:1]]}
            self._send(worker, body, tuple(segment.fd for segment in segments[:1]))
            for segment in segments[1:]:
                self._send_grown(worker, segment)

    @property
    def arena(self) -> Arena | None:
        """Where the blocks are, once there are any."""
        return self._arena

    @property
    def block_bytes(self) -> int:
        """Of one block."""
        return int(self._offer.get("block_bytes", 0))

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
        if not self._discarding or self._leaving or self._ledger is None or self._arena is None:
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
        assert self._arena is not None
        if not self._ledger.reset():
            return
        self._discarding = False
        if self._store is not None:
            self._store.arena_lost()
        if self._arena.discard():
            # Nobody has a block, so nobody looks at the memory that is taken away.
            self._ledger.backed = 0
            for connection in self._workers():
                self._send(connection, {"type": "kv_shrunk"})

    def gone(self, connection: Connection) -> None:
        """A connection has ended, and with it what it held and whose requests it kept alive."""
        if connection is self._watcher:
            self._watcher = None
        if self._ledger is None:
            return
        self._ledger.gateway_gone(connection.key)
        if connection.busy:
            return  # what is written to its blocks is waited for
        lingers_s = 0.0 if self._arena is None else self._arena.lingers_s
        if lingers_s and connection.attached:
            self._lingering.append((time.monotonic() + lingers_s, connection.key))
        else:
            self._worker_gone(connection.key)
        if self._preparer is not None:
            self._preparer.tidy()
        self._tell_available()

    def _worker_gone(self, worker: str) -> None:
        assert self._ledger is not None
        if self._preparer is not None:
            self._preparer.worker_gone(worker)
        self._ledger.worker_gone(worker, time.monotonic())

    def tick(self) -> None:
        """Ends the leases that have run out, and what has lingered."""
        while self._lingering and self._lingering[0][0] <= time.monotonic():
            self._worker_gone(self._lingering.popleft()[1])
            self._tell_available()
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
        self.on_released(request)
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
            body: dict[str, Any] = {"type": "assigned", "blocks": None, "reused": 0}
            if self._never(connection.key, request, attempt):
                body["error"] = self._too_much(count).to_wire()
            self._send(connection, body)
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

    def _never(self, worker: str, request: str, attempt: int) -> bool:
        """Whether a request that did not get its blocks never will: the device has no memory.

        That is so where nobody has any block, so that none will come back.
        """
        books = self._books
        if self._full is None or books.free < books.blocks:
            return False
        return books.may_assign(worker, request, attempt) and not self._is_preparing

    @property
    def _is_preparing(self) -> bool:
        return self._preparer is not None and self._preparer.busy

    def _too_much(self, count: int) -> RequestError:
        assert self._full is not None
        size = self._offer["block_bytes"]
        return RequestError(
            "the device has not enough memory left for the request's KV",
            where=self._full.where,
            expected=f"{count * size:,} bytes",
            got=self._full.got,
            hint="Ask for fewer tokens, or free memory of the device.",
        )

    def on_publish(self, connection: Connection, request: str, keys: list[str]) -> None:
        self._check_keys(connection, keys)
        new = self._books.publish(connection.key, request, keys)
        if self._store is not None:
            self._store.published(new)

    def on_watch(self, connection: Connection) -> None:
        """Tells the owner from now on which keys are published, and which are forgotten."""
        if connection.key != "owner":
            raise ReplicaError("only the owner watches keys", where=connection.key)
        self._watcher = connection
        if self._ledger is not None:
            self._ledger.watch()

    def tell_changes(self) -> None:
        """Tells who watches; to be called when messages have been answered."""
        if self._watcher is None or self._ledger is None:
            return
        changes = self._ledger.take_changes()
        if changes:
            stored = [key for key, published in changes.items() if published]
            removed = [key for key, published in changes.items() if not published]
            self._send(self._watcher, {"type": "kv_keys", "stored": stored, "removed": removed})

    def on_claim(self, connection: Connection, request: str, attempt: int) -> None:
        blocks = self._books.claim(connection.key, request, attempt)
        self._send(connection, {"type": "claimed", "blocks": blocks})

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
        if got is None or self._arena is None:
            body = {"type": "brought", "blocks": None, "reused": 0, "lost": False}
            self._send(connection, body)
            return
        connection.busy += 1

        def done(there: bool) -> None:
            self._post(lambda: self._brought(connection, request, got, there))

        bring(request, attempt, got.blocks[:written], got.reused, self._arena, done)

    def assign_for(
        self, connection: Connection, request: str, attempt: int, count: int, keys: list[str]
    ) -> Blocks | None:
        """Gives a worker a request's blocks, for somebody else to write to; see `on_assign`."""
        self._discarding, self._asked = False, True
        self._check_keys(connection, keys)
        got = self._assign(connection.key, request, attempt, count, keys)
        connection.waits_for_blocks = got is None
        if got is not None and self._store is not None:
            self._store.forgotten(got.forgotten)
        return got

    def claim_for(self, holder: str, request: str, attempt: int) -> list[int] | None:
        """The blocks of a request that was handed over, for a holder that is no worker."""
        return self._books.claim(holder, request, attempt)

    def let_go(self, holder: str, request: str, *, leased: bool = False) -> None:
        """Such a holder, or a worker, has no more use for them.

        Args:
            holder: Who had them.
            request: Whose they are.
            leased: Whether another worker may claim them still.
        """
        if leased:
            self._books.drop(holder, request, time.monotonic())
        else:
            self._books.finish(holder, request)
        self._tell_available()

    def _brought(self, connection: Connection, request: str, got: Blocks, there: bool) -> None:
        connection.busy -= 1
        if connection.gone:
            self.gone(connection)
            return
        if not there:
            self._books.finish(connection.key, request)
        blocks = got.blocks if there else None
        body = {"type": "brought", "blocks": blocks, "reused": got.reused, "lost": not there}
        self._send(connection, body)
        self._tell_available()

    def on_drop(self, connection: Connection, request: str) -> None:
        self._books.drop(connection.key, request, time.monotonic())
        self._send(connection, {"type": "dropped"})
        self._tell_available()

    def on_finish(self, connection: Connection, request: str) -> None:
        if self.is_written(connection, request):
            return
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
