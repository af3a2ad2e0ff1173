"""The memory service's desk for KV: the arena of blocks, and the messages that move them about."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from coldframe.loader.arena import PAGE, Segment, round_up
from coldframe.loader.connection import Connection
from coldframe.loader.devices import Device
from coldframe.loader.errors import ReplicaError
from coldframe.loader.ledger import BlockLedger, KvUsage

__all__ = ["KvDesk"]


class KvDesk:
    """Answers every message that is about KV blocks; see `BlockLedger` for the rules.

    Args:
        device: Where the blocks lie.
        send: Sends a message to a connection.
        connections: All that there are.
    """

    def __init__(
        self,
        device: Device,
        send: Callable[..., None],
        connections: Callable[[], Iterable[Connection]],
    ) -> None:
        self._device = device
        self._send = send
        self._connections = connections
        self._ledger: BlockLedger | None = None
        self._offer: tuple[dict[str, Any], Segment] | None = None
        self._discarding = False

    def open_arena(self, block_bytes: int, blocks: int, lease_s: float) -> None:
        """Makes the arena and offers it to every worker.

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

    def greet(self, worker: Connection) -> None:
        """Gives the arena to a worker, if it stands already."""
        if self._offer is not None:
            body, segment = self._offer
            self._send(worker, body, (segment.fd,))

    def usage(self) -> KvUsage:
        """What the ledger counts; nothing before the arena."""
        return KvUsage() if self._ledger is None else self._ledger.usage

    def discard(self) -> None:
        """Gives the memory of all blocks back, as soon as no worker has any and until one is asked.

        Raises:
            DeviceError: It cannot be given back.
        """
        self._discarding = True
        self._try_to_discard()

    def _try_to_discard(self) -> None:
        if not self._discarding or self._ledger is None or self._offer is None:
            return
        if self._ledger.reset():
            self._discarding = False
            _, segment = self._offer
            self._device.discard(segment.fd, segment.length)

    def gone(self, connection: Connection) -> None:
        """A connection has ended, and with it what it held and whose requests it kept alive."""
        if self._ledger is not None:
            self._ledger.worker_gone(connection.key, time.monotonic())
            self._ledger.gateway_gone(connection.key)
            self._tell_available()

    def tick(self) -> None:
        """Ends the leases that have run out."""
        if self._ledger is not None and self._ledger.expire(time.monotonic()):
            self._tell_available()

    # -- messages --------------------------------------------------------------------------------

    def on_open(self, connection: Connection, request: str) -> None:
        self._books.open(request, connection.key)
        self._tell_available()  # a worker may have asked before

    def on_release(self, connection: Connection, request: str) -> None:
        self._books.release(request)
        self._tell_available()

    def on_assign(
        self, connection: Connection, request: str, attempt: int, count: int, keys: list[str]
    ) -> None:
        self._discarding = False
        got = self._books.assign(connection.key, request, attempt, count, keys)
        connection.waits_for_blocks = got is None
        body = {"blocks": None, "reused": 0} if got is None else asdict(got)
        self._send(connection, {"type": "assigned", **body})
        if got is not None:
            self._tell_available()  # a new attempt frees what the old one has left

    def on_publish(self, connection: Connection, request: str, keys: list[str]) -> None:
        self._books.publish(connection.key, request, keys)

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
