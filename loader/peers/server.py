"""Serves an arena to other memory services, also while it is being filled.

A thread for each connection, a bounded number of them, none of the service's own loop. A range is
answered once all of its stages are in; what readers ask for is of one stage, so nothing that is
there waits for what is not. Meanwhile `100 Continue` goes out every few seconds: a peer that
waits can tell a slow source from a dead one, and we notice when it has gone.

Bodies are sent from the arena itself. Not with sendfile, even where files are mapped in place:
its pages are read when the network takes them, which may be after a writer was let in.

It is not encrypted: the token and the weights can be read on the way.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from coldframe.loader.errors import ColdframeError, ReplicaError, RequestError
from coldframe.loader.peers.answers import Refusal, answer, busy
from coldframe.loader.peers.http import MAX_HEAD_BYTES, Answer, Request, parse_request
from coldframe.loader.peers.listener import check_access
from coldframe.loader.peers.node import Node
from coldframe.loader.peers.seating import about_node
from coldframe.loader.peers.serving import Offer

__all__ = ["PeerServer", "ServerLimits"]

_SLICE = 1 << 20
_LINGER_S = 0.1


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """How much, and for how long.

    Attributes:
        connections: At once; one more is told to come again later.
        idle_s: Until the first byte of a request.
        head_s: For the rest of its head.
        stall_s: For the client to take a MiB.
        patience_s: Until a stage is in; much longer than one takes, since a client that has gone is
            noticed anyway.
        plan_s: Until it is known what is served; then the client is told to come again.
        beat_s: From one sign of life to the next while a client waits for a stage.
    """

    connections: int = 128
    idle_s: float = 60.0
    head_s: float = 10.0
    stall_s: float = 30.0
    patience_s: float = 3600.0
    plan_s: float = 5.0
    beat_s: float = 2.0


class PeerServer:
    """Answers peers, from the moment it is made.

    Args:
        listener: A listening socket (see `listener`); closed with the server.
        token: What peers must send, or None: then only this machine may ask.
        limits: How much, and for how long.
        node: What is told of this replica, and who reads from it; None tells nothing.

    Raises:
        PlatformError: The token cannot be used, or there is none and others than this machine
            can reach the socket.
    """

    def __init__(
        self,
        listener: socket.socket,
        token: str | None,
        limits: ServerLimits = ServerLimits(),
        node: Node | None = None,
    ) -> None:
        self._node = node
        self._listener = listener
        self._limits = limits
        try:
            check_access(listener, token)
        except BaseException:
            listener.close()
            raise
        self._bearer = None if token is None else f"Bearer {token}".encode()
        self._offer: Offer | None = None
        self._failure: ColdframeError | None = None
        self._changed = threading.Condition()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._served = 0
        self._accepting = threading.Thread(target=self._accept, name="peers", daemon=True)
        self._accepting.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port where it listens."""
        host, port, *_ = self._listener.getsockname()
        return host, port

    @property
    def served_bytes(self) -> int:
        """Bytes of bodies that peers have taken."""
        return self._served

    def offer(self, offer: Offer) -> None:
        """What is served from now on; requests that came before it have waited."""
        with self._changed:
            self._offer = offer
            self._changed.notify_all()

    def fail(self, error: ColdframeError) -> None:
        """There will be nothing to serve, or nothing any more: the load failed."""
        with self._changed:
            if self._offer is not None:
                self._offer.gate.end(error)
            self._failure = error
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all connections; when it returns, nobody reads the arena for peers any more."""
        with self._changed:
            self._closing = True
            threads = list(self._open.values())
            for connection in self._open:
                _shut(connection)
        # For our own threads: no client hears of it. Who has lost a connection tries again, and
        # finds the peer that was started in this one's place.
        self.fail(ReplicaError("the peer has ended"))
        _shut(self._listener)  # wakes the thread in accept, as closing would not
        self._accepting.join()
        self._listener.close()
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                time.sleep(0 if self._closing else 0.05)  # until a descriptor is free again
                continue
            with self._changed:
                take = len(self._open) < self._limits.connections and not self._closing
                if take:
                    thread = threading.Thread(
                        target=self._converse, args=(connection,), name="peer", daemon=True
                    )
                    self._open[connection] = thread
                    thread.start()
            if not take:
                _turn_away(connection)

    def _converse(self, connection: socket.socket) -> None:
        try:
            # A connection that breaks is the client's to make again.
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                buffer = bytearray()
                while not self._closing and self._serve_one(connection, buffer):
                    pass
        finally:
            with self._changed:
                del self._open[connection]
            connection.close()

    def _serve_one(self, connection: socket.socket, buffer: bytearray) -> bool:
        """One request and its answer; returns whether the connection goes on."""
        request: Request | None = None
        try:
            head = self._read_head(connection, buffer)
            if head is None:
                return False
            request = parse_request(head)
            wait = _Wait(connection if request.interim else None, self._limits)
            host = connection.getpeername()[0]
            given = answer(
                request, self._bearer, self._offered, wait, lambda asked: self._about(asked, host)
            )
        except RequestError as error:
            given = Refusal(400, error).answer
        except Refusal as refusal:
            given = refusal.answer
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - what breaks here is the client's to know
            given = Refusal(500, ReplicaError("the peer broke", got=repr(error))).answer
        # Who has no token does not get to hold on to a connection.
        keep_alive = request is not None and request.keep_alive and given.status not in (400, 401)
        with_body = request is None or request.method != "HEAD"
        self._send(connection, given, keep_alive, with_body)
        return keep_alive

    def _send(
        self, connection: socket.socket, given: Answer, keep_alive: bool, with_body: bool
    ) -> None:
        connection.settimeout(self._limits.stall_s)  # for all of a call, however often it sends
        with_body = with_body and given.length > 0
        # The head goes out with the first of the body.
        connection.sendall(given.head(keep_alive=keep_alive), socket.MSG_MORE if with_body else 0)
        if not with_body:
            return
        for part in given.parts:
            for start in range(0, len(part), _SLICE):
                connection.sendall(part[start : start + _SLICE])
        with self._changed:
            self._served += given.length

    def _read_head(self, connection: socket.socket, buffer: bytearray) -> bytes | None:
        """The next request's head, or None where the client goes or takes too long."""
        deadline: float | None = None
        while True:
            while buffer.startswith(b"\r\n"):  # allowed before a request
                del buffer[:2]
            head, end, rest = buffer.partition(b"\r\n\r\n")
            if len(head) > MAX_HEAD_BYTES:
                raise Refusal(431, RequestError("the head of the request is too large"))
            if end:
                buffer[:] = rest
                return bytes(head)
            if buffer and deadline is None:
                deadline = time.monotonic() + self._limits.head_s
            left = self._limits.idle_s if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return None
            connection.settimeout(left)
            received = connection.recv(MAX_HEAD_BYTES)
            if not received:
                return None
            buffer += received

    def _about(self, request: Request, host: str) -> Answer | None:
        return None if self._node is None else about_node(request, self._node, host)

    def _offered(self, timeout: float) -> Offer | None:
        with self._changed:
            self._changed.wait_for(lambda: self._offer or self._failure, timeout)
            if self._offer is None and self._failure is not None:
                raise ColdframeError.from_wire(self._failure.to_wire())
            return self._offer


class _Wait:
    """Waits for a client, and lets it know that we are there."""

    def __init__(self, connection: socket.socket | None, limits: ServerLimits) -> None:
        self._connection = connection
        self._limits = limits

    def __call__(self, there: Callable[[float], bool], *, planned: bool = True) -> bool:
        patience = self._limits.patience_s
        deadline = time.monotonic() + (patience if planned else min(patience, self._limits.plan_s))
        while True:
            left = deadline - time.monotonic()
            if there(max(0.0, min(left, self._limits.beat_s))):
                return True
            if left <= 0:
                return False
            if self._connection is not None:
                self._connection.settimeout(self._limits.stall_s)
                self._connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


def _turn_away(connection: socket.socket) -> None:
    given = busy().answer
    with contextlib.suppress(OSError), connection:
        connection.settimeout(_LINGER_S)
        connection.sendall(b"".join([given.head(keep_alive=False), *given.parts]))
        # What has been asked is read, or else our answer would be lost with a reset.
        connection.shutdown(socket.SHUT_WR)
        connection.recv(MAX_HEAD_BYTES)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
