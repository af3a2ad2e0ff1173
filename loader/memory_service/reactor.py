"""The memory service's reactor: one thread, one selector, and all who are connected.

What its desks do they do in this thread, so that none of their state needs a lock; other threads
and signal handlers have something done by it (`post`). It knows how messages come and go, and
nothing of what they mean.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from coldframe.loader.arena import Segment
from coldframe.loader.errors import ReplicaError
from coldframe.loader.memory_service.connection import OWNER, Connection
from coldframe.loader.wire import MAX_FDS, Channel, Message

__all__ = ["Reactor"]

_TICK_S = 1.0
_SEND_TIMEOUT_S = 10


class Reactor:
    """The loop and its connections. All methods but `post` are for its own thread.

    Args:
        owner: The channel to the process that started it; when that ends, so does the loop.
        on_message: Given each message and who has sent it. What it raises ends that connection.
        on_gone: Told of each connection that has ended.

    Attributes:
        owner: The owner's connection.
        running: Whether the owner is there.
    """

    def __init__(
        self,
        owner: Channel,
        *,
        on_message: Callable[[Connection, Message], None],
        on_gone: Callable[[Connection], None],
    ) -> None:
        self._on_message = on_message
        self._on_gone = on_gone
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wakeup, selectors.EVENT_READ, None)
        self._connections: dict[int, Connection] = {}
        self._next_key = 0
        self._listener: socket.socket | None = None
        self.running = True
        self.owner = Connection(OWNER, owner)
        self._add(self.owner)

    def listen(self, path: str) -> None:
        """Lets workers and gateways connect to a socket at a path."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
        listener.listen(64)
        listener.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, listener)

    def run(self, *, each_round: Callable[[], None], each_second: Callable[[], None]) -> None:
        """Serves until the owner is gone.

        Args:
            each_round: Called when what has come in has been answered.
            each_second: Called about once a second, behind that.
        """
        next_tick = time.monotonic() + _TICK_S
        while self.running:
            for key, _ in self._selector.select(max(0.0, next_tick - time.monotonic())):
                self._dispatch(key)
            each_round()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_S
                each_second()

    def post(self, action: Callable[[], None]) -> None:
        """Has something done by the loop; for threads and signal handlers."""
        self._posted.append(action)
        os.eventfd_write(self._wakeup, 1)

    def close(self) -> None:
        """Ends all connections."""
        if self._listener is not None:
            self._listener.close()
        for connection in self._connections.values():
            connection.close()
        self._selector.close()  # the eventfd stays: threads that are left behind may post still

    # -- who is connected ------------------------------------------------------------------------

    @property
    def connections(self) -> list[Connection]:
        return list(self._connections.values())

    @property
    def workers(self) -> list[Connection]:
        """Those that map the arenas."""
        return [connection for connection in self._connections.values() if connection.attached]

    def send(self, connection: Connection, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Sends a message. Who does not take it is gone."""
        try:
            connection.send(body, fds)
        except ReplicaError:
            self._remove(connection)

    def send_segments(
        self,
        connection: Connection,
        kind: str,
        segments: list[Segment],
        more: dict[str, Any] | None = None,
    ) -> None:
        """Sends segments, with as many to a message as it can carry; the last one says so.

        Args:
            connection: To whom.
            kind: What the messages are.
            segments: What is sent.
            more: What each of them says beside.
        """
        for start in range(0, len(segments), MAX_FDS):
            some = segments[start : start + MAX_FDS]
            body = {
                **(more or {}),
                "type": kind,
                "segments": [segment.to_wire() for segment in some],
                "last": start + MAX_FDS >= len(segments),
            }
            self.send(connection, body, tuple(segment.fd for segment in some))

    def hold(self, name: str, held: bool) -> None:
        """Holds back what is sent to the workers of a name, or lets it go."""
        for worker in [worker for worker in self.workers if worker.name == name]:
            try:
                worker.hold() if held else worker.release()
            except ReplicaError:
                self._remove(worker)

    # -- what comes in ---------------------------------------------------------------------------

    def receive(self, connection: Connection) -> None:
        """Reads once from a connection, and waits for that; then handles what is complete."""
        messages, ended = connection.channel.receive_ready()
        for fd in [fd for message in messages for fd in message.fds]:
            os.close(fd)  # nobody has any to send here
        try:
            for message in messages:
                # Once it is gone nothing may be booked on it any more: it would never come back.
                if not connection.gone:
                    self._on_message(connection, message)
        except Exception as error:  # noqa: BLE001 - who talks nonsense harms only itself
            with contextlib.suppress(OSError):
                who = f"{connection.key} {connection.name}"
                print(f"coldframe memory: {who}: {error!r}", file=sys.stderr)
            ended = True
        if ended:
            self._remove(connection)

    def _dispatch(self, key: selectors.SelectorKey) -> None:
        if key.data is None:
            os.eventfd_read(self._wakeup)
            while self._posted:
                self._posted.popleft()()
        elif isinstance(key.data, Connection):
            self.receive(key.data)
        else:
            sock, _ = key.data.accept()
            self._next_key += 1
            self._add(Connection(f"client-{self._next_key}", Channel(sock)))

    def _add(self, connection: Connection) -> None:
        connection.channel.set_send_timeout(_SEND_TIMEOUT_S)
        self._connections[connection.channel.fileno()] = connection
        self._selector.register(connection.channel.fileno(), selectors.EVENT_READ, connection)

    def _remove(self, connection: Connection) -> None:
        fd = connection.channel.fileno()
        if self._connections.pop(fd, None) is None:
            return
        connection.gone = True
        self._selector.unregister(fd)
        connection.close()
        if connection is self.owner:
            self.running = False
        self._on_gone(connection)
