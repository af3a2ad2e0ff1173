"""Connections that are kept for the next request."""

from __future__ import annotations

import select
import threading

from coldframe.loader.errors import SourceError
from coldframe.loader.web.address import Target
from coldframe.loader.web.connection import Connection
from coldframe.loader.web.dial import Dialler

__all__ = ["Pool", "cancelled_error"]

_Server = tuple[str, str, int]


class Pool:
    """Connections by server. Safe for several threads.

    Args:
        dialler: Makes new ones.
    """

    def __init__(self, dialler: Dialler) -> None:
        self._dialler = dialler
        self._lock = threading.Lock()
        self._idle: dict[_Server, list[Connection]] = {}
        self._busy: dict[Connection, _Server] = {}
        self._closed = False

    def take(self, target: Target, *, fresh: bool = False) -> Connection:
        """A connection for one request; give it back with `give` or `drop`.

        Args:
            target: The request.
            fresh: A new one.

        Raises:
            Broken: There is none for now.
            SourceError: There will be none; or the pool is closed.
        """
        server = (target.scheme, target.host, target.port)
        connection = None if fresh else self._take_idle(server)
        if connection is None:
            connection = self._dialler.dial(target)
        with self._lock:
            if not self._closed:
                self._busy[connection] = server
                return connection
        connection.close()
        raise cancelled_error()

    def give(self, connection: Connection) -> None:
        """Takes it back, for the next request if the answer was read to its end."""
        with self._lock:
            server = self._busy.pop(connection)
            if connection.reusable and not self._closed:
                self._idle.setdefault(server, []).append(connection)
                return
        connection.close()

    def drop(self, connection: Connection) -> None:
        """Takes it back, for nothing."""
        with self._lock:
            self._busy.pop(connection)
        connection.close()

    def close(self) -> None:
        """Ends all that is waited for; from now on there are no connections."""
        with self._lock:
            self._closed = True
            idle = [connection for found in self._idle.values() for connection in found]
            self._idle.clear()
            for connection in self._busy:  # closed by whoever uses them
                connection.shut_down()
        for connection in idle:
            connection.close()

    def _take_idle(self, server: _Server) -> Connection | None:
        """The one that was used last, and is thus the least likely to have been closed."""
        while True:
            with self._lock:
                found = self._idle.get(server)
                if not found:
                    return None
                connection = found.pop()
            if not _readable(connection):
                return connection
            connection.close()


def _readable(connection: Connection) -> bool:
    """Whether there is something where nothing was asked for: mostly the connection's end."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def cancelled_error() -> SourceError:
    """What a read ends with that nobody waits for any more."""
    return SourceError("the load was given up", hint="Nothing to do: it was on purpose.")
