"""Blocks from another host over TCP: as many connections as there is something to gain by.

The other side is `giver`. Bytes are received straight to where they belong; where the host cannot
look at the arena, into a buffer that is copied there.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.errors import ColdframeError, TransferBroken, TransferError
from coldframe.loader.kv.runs import Run
from coldframe.loader.memory import borrowed
from coldframe.loader.transport.base import Ticket, Way, parse_address
from coldframe.loader.transport.giver import PURPOSE
from coldframe.loader.transport.handshake import dial
from coldframe.loader.transport.secure import SecureSocket

__all__ = ["TcpTaker", "has_ended"]

STREAMS = 4
"""Connections for one request's KV, at most: one alone does not fill a fast link."""
_LEAST = 8 << 20
"""Bytes that are worth a connection more."""
_PIECE = 4 << 20
_TIMEOUT_S = 10.0
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
        """Ends the connections that are kept for the next request."""
        with self._lock:
            kept, self._kept = self._kept, []
        for _, _, connection in kept:
            connection.close()

    def refusal(self, way: Way) -> str | None:
        if self._secret is None:
            return "there is no secret here to show (COLDFRAME_KV_SECRET_FILE)"
        if parse_address(way.address) is None:
            return "its address is none"
        return None

    def take(
        self,
        ticket: Ticket,
        way: Way,
        runs: Sequence[Run],
        arena: Arena,
        device: Device,
        watch: Callable[[Callable[[], None]], None],
    ) -> None:
        if not runs:
            self._say_taken(ticket, way)
            return
        nbytes = ticket.block_bytes * sum(count for _, _, count in runs)
        streams = max(1, min(self._streams, nbytes // _LEAST))
        parts = _parts(runs, streams)
        errors: list[ColdframeError] = []
        hanging = _Connections()

        def fetch(part: Sequence[Run]) -> None:
            try:
                self._fetch(ticket, way, part, arena, hanging)
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
        self._say_taken(ticket, way)

    def _fetch(
        self,
        ticket: Ticket,
        way: Way,
        runs: Sequence[Run],
        arena: Arena,
        hanging: _Connections,
    ) -> None:
        connection = self._connection(way.address)
        try:
            hanging.add(connection)
            wanted = [[there, count] for _, there, count in runs]
            asked = {"do": "blocks", "token": ticket.token, "runs": wanted, "keyed": self._keyed}
            nbytes = self._ask(connection, asked).get("nbytes")
            size = ticket.block_bytes
            if nbytes != size * sum(count for _, _, count in runs):
                raise TransferBroken("the sender's blocks have another size", got=nbytes)
            hashed = connection.keyed(outgoing=False) if self._keyed else None
            for here, _, count in runs:
                start, end = here * size, (here + count) * size
                for offset in range(start, end, _PIECE):
                    length = min(_PIECE, end - offset)
                    with borrowed(arena, offset, length, write=True) as view:
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

    def _say_taken(self, ticket: Ticket, way: Way) -> None:
        """The sender may have its blocks back; if it does not hear that, it has them later."""
        with suppress(TransferError):
            connection = self._connection(way.address)
            try:
                self._ask(connection, {"do": "taken", "token": ticket.token})
            except BaseException:
                connection.close()
                raise
            self._keep(way.address, connection)

    def _ask(self, connection: SecureSocket, asked: dict[str, object]) -> dict[str, object]:
        connection.send(asked)
        answer = connection.recv()
        if answer is None:
            raise TransferBroken("the sender is gone")
        error = answer.get("error")
        if isinstance(error, dict):
            raise ColdframeError.from_wire(error)
        return answer

    def _connection(self, address: str) -> SecureSocket:
        late = time.monotonic() - _KEPT_S
        found = None
        with self._lock:
            for entry in list(self._kept):
                if entry[0] < late or (found is None and entry[1] == address):
                    self._kept.remove(entry)
                    if entry[0] < late or has_ended(entry[2]):
                        entry[2].close()
                    else:
                        found = entry[2]
        if found is not None:
            return found
        assert self._secret is not None
        return dial(address, self._secret, PURPOSE, timeout_s=_TIMEOUT_S)

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


def has_ended(connection: SecureSocket) -> bool:
    """Whether the other side has hung up; nobody says anything between two questions."""
    import select

    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


def _parts(runs: Sequence[Run], count: int) -> list[list[Run]]:
    """Runs dealt out to so many, each about the same number of blocks."""
    total = sum(blocks for _, _, blocks in runs)
    each = -(-total // count)
    parts: list[list[Run]] = [[]]
    room = each
    for here, there, blocks in runs:
        while blocks:
            if not room:
                parts.append([])
                room = each
            some = min(blocks, room)
            parts[-1].append((here, there, some))
            here, there, blocks, room = here + some, there + some, blocks - some, room - some
    return parts
