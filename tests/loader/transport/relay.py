"""A sender's listener with somebody in between, who can hold back what the sender answers."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType

from coldframe.loader.transport.base import parse_address

__all__ = ["Relay"]

_PIECE = 1 << 16
_END_S = 20.0


class Relay:
    """Passes on all bytes as they are, in both directions; a context manager.

    Args:
        to: The sender's listener.
        host: Where this listens, at a port that is free.
        port: Another one.
        holds: An answer of so many bytes at once is held back until `pass_on`: more than a
            handshake has.

    Attributes:
        address: What a ticket says in place of the sender's own.
        held: Set when an answer has come that is held back.
    """

    def __init__(
        self, to: str, *, host: str = "127.0.0.1", port: int = 0, holds: int = 200
    ) -> None:
        place = parse_address(to)
        assert place is not None
        self._to = place
        self._holds = holds
        self._listener = socket.create_server((host, port))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self.held = threading.Event()
        self._passing = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []

    def __enter__(self) -> Relay:
        self._threads[0].start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._passing.set()
        _shut(self._listener)
        self._threads[0].join(_END_S)
        self._listener.close()
        for sock in self._open:
            _shut(sock)
        for thread in self._threads:
            thread.join(_END_S)
            assert not thread.is_alive()
        for sock in self._open:
            sock.close()

    def hold(self) -> None:
        """Holds the next such answer back, where `pass_on` has been called before."""
        self.held.clear()
        self._passing.clear()

    def pass_on(self) -> None:
        """Lets the answer go that is held back, and all that come behind it."""
        self._passing.set()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(client)
            try:
                sender = socket.create_connection(self._to, _END_S)
            except OSError:  # nobody is there any more
                _shut(client)
                continue
            sender.settimeout(None)
            self._open.append(sender)
            for pair in ((client, sender, False), (sender, client, True)):
                thread = threading.Thread(target=self._pass, args=pair)
                self._threads.append(thread)
                thread.start()

    def _pass(self, source: socket.socket, target: socket.socket, holding: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE):
                if holding and len(data) >= self._holds:
                    self.held.set()
                    self._passing.wait()
                target.sendall(data)
        _shut(source)
        _shut(target)


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
