"""Blocks from another host over TCP: as many connections as there is something to gain by.

The other side is `giver`. Bytes are received straight to where they belong; where the host cannot
look at the arena, into a buffer that is copied there.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from coldframe.loader.errors import ColdframeError, TransferBroken, TransferError
from coldframe.loader.kv.runs import Run, cut, deal
from coldframe.loader.memory import borrowed
from coldframe.loader.transport.asking import ask, call, refusal_of
from coldframe.loader.transport.base import Transfer, Watch, Way
from coldframe.loader.transport.secure import SecureSocket

__all__ = ["TcpTaker"]

STREAMS = 4
"""Connections for one request's KV, at most: one alone does not fill a fast link."""
_LEAST = 8 << 20
"""Bytes that are worth a connection more."""
_PIECE = 4 << 20
_KEPT_S = 30.0
_HASH_BYTES = 32


class TcpTaker:
    """See `Taker`.

    Args:
        secret: That senders know, too; None where there is none.
        keyed: Whether blocks are held against a keyed hash of theirs.
        streams: Connections for one request, at most.
    """

    def __init__(
        self, secret: bytes | None, *, keyed: bool = False, streams: int = STREAMS
    ) -> None:
        self._secret = secret
        self._keyed = keyed
        self._streams = streams
        self._lock = threading.Lock()
        self._kept: list[tuple[float, str, SecureSocket]] = []

    def close(self) -> None:
        with self._lock:
            kept, self._kept = self._kept, []
        for _, _, connection in kept:
            connection.close()

    def refusal(self, way: Way) -> str | None:
        return refusal_of(way, self._secret)

    def take(self, transfer: Transfer, way: Way, watch: Watch) -> None:
        if not transfer.runs:
            self._say_taken(transfer, way)
            return
        streams = max(1, min(self._streams, transfer.nbytes // _LEAST))
        parts = deal(transfer.runs, streams)
        errors: list[ColdframeError] = []
        hanging = _Connections()

        def fetch(part: Sequence[Run]) -> None:
            try:
                self._fetch(transfer, way, part, hanging)
            except ColdframeError as error:
                errors.append(error)
                hanging.stop()  # of what is missing a part, the rest is of no use

        watch(hanging.stop)
        others = [
            threading.Thread(target=fetch, args=(part,), name="kv-take", daemon=True)
            for part in parts[1:]
        ]
        for thread in others:
            thread.start()
        fetch(parts[0])
        for thread in others:
            thread.join()
        if errors:
            raise errors[0]
        self._say_taken(transfer, way)

    def _fetch(
        self, transfer: Transfer, way: Way, runs: Sequence[Run], hanging: _Connections
    ) -> None:
        token, size = transfer.ticket.token, transfer.ticket.block_bytes
        connection = self._connection(way.address)
        try:
            hanging.add(connection)
            wanted = [[there, count] for _, there, count in runs]
            asked = {"do": "blocks", "token": token, "runs": wanted, "keyed": self._keyed}
            nbytes = ask(connection, asked).get("nbytes")
            if nbytes != size * sum(count for _, _, count in runs):
                raise TransferBroken("the sender's blocks have another size", got=nbytes)
            hashed = connection.keyed(outgoing=False) if self._keyed else None
            for here, _, count in runs:
                for offset, length in cut(here, count, size, _PIECE):
                    with borrowed(transfer.arena, offset, length, write=True) as view:
                        connection.recv_into(view)
                        if hashed is not None:
                            hashed.update(view)
            if hashed is not None:
                proof = bytearray(_HASH_BYTES)
                connection.recv_into(memoryview(proof))
                if not hmac.compare_digest(proof, hashed.digest()):
                    raise TransferBroken("blocks were changed on their way", where=way.address)
        except BaseException:
            connection.close()
            raise
        finally:
            hanging.remove(connection)
        self._keep(way.address, connection)

    def _say_taken(self, transfer: Transfer, way: Way) -> None:
        """The sender may have its blocks back; if it does not hear that, it has them later."""
        with suppress(TransferError):
            connection = self._connection(way.address)
            try:
                ask(connection, {"do": "taken", "token": transfer.ticket.token})
            except BaseException:
                connection.close()
                raise
            self._keep(way.address, connection)

    def _connection(self, address: str) -> SecureSocket:
        late = time.monotonic() - _KEPT_S
        found = None
        with self._lock:
            for entry in list(self._kept):
                if entry[0] < late or (found is None and entry[1] == address):
                    self._kept.remove(entry)
                    if entry[0] < late or entry[2].has_ended():
                        entry[2].close()
                    else:
                        found = entry[2]
        return call(address, self._secret) if found is None else found

    def _keep(self, address: str, connection: SecureSocket) -> None:
        with self._lock:
            self._kept.append((time.monotonic(), address, connection))


class _Connections:
    """Those over which one request's KV comes, and whether it is to come no more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[SecureSocket] = []
        self._stopped = False

    def add(self, connection: SecureSocket) -> None:
        """One more.

        Raises:
            TransferBroken: It is broken off already.
        """
        with self._lock:
            if self._stopped:
                raise TransferBroken("nobody waits for this any more")
            self._open.append(connection)

    def remove(self, connection: SecureSocket) -> None:
        with self._lock:
            if connection in self._open:
                self._open.remove(connection)

    def stop(self) -> None:
        """Breaks all of them off; any thread may call it."""
        with self._lock:
            self._stopped = True
            for connection in self._open:
                connection.hang_up()
