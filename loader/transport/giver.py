"""Gives blocks to other hosts: a listener in the memory service, a thread for each connection.

Behind the handshake (`secure`) a client may ask, any number of times, in messages:

    {"do": "blocks", "token", "runs": [[first, count], ...], "keyed"}   some of an offer's blocks
        -> {"nbytes"}, then the blocks as they are, then their keyed hash where it was wished
    {"do": "taken", "token"}            all are there: the offer is over
        -> {"taken"}
    {"do": "lend", "token"}             where they are, for who reads them by other means, until
        -> {"blocks", ...}              it says something more, or hangs up
    each instead                        -> {"error"}

Blocks are sent from the arena itself, and copied out piece by piece where the host cannot look at
it. A client that does not read is given up after half a minute, and its blocks with it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

from coldframe.loader.devices.base import Arena
from coldframe.loader.errors import (
    DeviceError,
    TransferBroken,
    TransferError,
    TransferRefused,
)
from coldframe.loader.kv.runs import cut, places_of
from coldframe.loader.memory import borrowed
from coldframe.loader.transport.handshake import welcome
from coldframe.loader.transport.offers import Offer, Offers
from coldframe.loader.transport.secure import SecureSocket

__all__ = ["PURPOSE", "Giver"]

PURPOSE = "kv"
_MOST_CONNECTIONS = 128
_IDLE_S = 60.0
_STALL_S = 30.0
_LENT_S = 120.0
_PIECE = 4 << 20
_MOST_RUNS = 1 << 16


class Giver:
    """Serves offers, from when it is made.

    Args:
        listener: A listening socket; closed with this.
        secret: That clients must know.
        offers: What there is.
        arena: Tells where the blocks are, once there are any.
        block_bytes: Tells how large one is, likewise.
        lend: Says what there is to say of the arena to who reads it by other means; None where
            nobody may.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: bytes,
        offers: Offers,
        arena: Callable[[], Arena],
        block_bytes: Callable[[], int],
        lend: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._listener = listener
        self._secret = secret
        self._offers = offers
        self._arena = arena
        self._block_bytes = block_bytes
        self._lend_by = lend
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._accepting = threading.Thread(target=self._accept, name="kv-give", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Ends all connections, and waits for those that read the arena."""
        self._closing = True
        with contextlib.suppress(OSError):  # it wakes who accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        with self._lock:
            serving = dict(self._open)
        for sock in serving:
            _shut(sock)
        for thread in serving.values():
            thread.join()

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closing:
                    return
                threading.Event().wait(0.1)  # no descriptors at the moment, for example
                continue
            with self._lock:
                if len(self._open) >= _MOST_CONNECTIONS or self._closing:
                    sock.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(sock,), name="kv-give", daemon=True
                )
                self._open[sock] = thread
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = welcome(sock, self._secret, PURPOSE)
            while not self._closing:
                sock.settimeout(_IDLE_S)
                asked = client.recv()
                if asked is None:
                    return
                sock.settimeout(_STALL_S)
                self._answer(client, asked)
        except (TransferError, DeviceError, OSError):
            return  # a stranger's affair; the offers are as they were
        finally:
            with self._lock:
                del self._open[sock]
            sock.close()

    def _answer(self, client: SecureSocket, asked: dict[str, Any]) -> None:
        token = asked.get("token")
        if not isinstance(token, str):
            raise TransferBroken("a client shows no token")
        match asked.get("do"):
            case "blocks":
                self._give(client, token, asked)
            case "taken":
                client.send({"taken": self._offers.take(token)})
            case "lend":
                self._lend(client, token)
            case other:
                raise TransferBroken("a client wants something unknown", got=repr(other)[:80])

    def _give(self, client: SecureSocket, token: str, asked: dict[str, Any]) -> None:
        try:
            with self._offers.reading(token, client.hang_up) as offer:
                places = _places(offer, asked.get("runs"))
                self._send(client, places, keyed=asked.get("keyed") is True)
        except TransferRefused as refusal:
            client.send({"error": refusal.to_wire()})

    def _lend(self, client: SecureSocket, token: str) -> None:
        try:
            if self._lend_by is None:
                raise TransferBroken("KV is not lent here")
            told = self._lend_by()
        except TransferError as error:
            client.send({"error": error.to_wire()})
            return
        try:
            # Who reads is not to be stopped from here: it is waited for, though not for ever.
            with self._offers.reading(token, _let_read) as offer:
                client.send({**told, "blocks": list(offer.blocks)})
                client.sock.settimeout(_LENT_S)
                said = client.recv()
        except TransferRefused as refusal:
            client.send({"error": refusal.to_wire()})
            return
        if said is not None:
            self._answer(client, said)

    def _send(self, client: SecureSocket, places: list[tuple[int, int]], *, keyed: bool) -> None:
        arena, size = self._arena(), self._block_bytes()
        client.send({"nbytes": size * sum(count for _, count in places)})
        hashed = client.keyed(outgoing=True) if keyed else None
        for block, count in places:
            for offset, length in cut(block, count, size, _PIECE):
                with borrowed(arena, offset, length) as view:
                    client.sock.sendall(view)
                    if hashed is not None:
                        hashed.update(view)
        if hashed is not None:
            client.sock.sendall(hashed.digest())


def _places(offer: Offer, runs: Any) -> list[tuple[int, int]]:
    """What is asked for, as neighbouring blocks of the arena: the first, and how many.

    Raises:
        TransferRefused: Some of it is not in the offer.
    """
    wanted: list[int] = []
    blocks = offer.blocks
    if not isinstance(runs, list) or len(runs) > _MOST_RUNS:
        raise _not_there()
    for run in runs:
        if not isinstance(run, list) or len(run) != 2 or not all(type(n) is int for n in run):
            raise _not_there()
        first, count = run
        if first < 0 or count < 1 or first + count > len(blocks):
            raise _not_there()
        wanted += blocks[first : first + count]
        if len(wanted) > len(blocks):  # nobody needs one twice, and lists have no end else
            raise _not_there()
    return places_of(wanted, 0, len(wanted))


def _not_there() -> TransferRefused:
    return TransferRefused("these blocks are not in the offer")


def _let_read() -> None:
    """See `Giver._lend`."""


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
