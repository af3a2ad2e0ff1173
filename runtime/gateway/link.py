"""The gateway's end of the socket to the front, under asyncio: neither side can hold the other up.

What the socket does not take at once waits in a buffer here, and reading never stops. So the front
may block while it sends, and both get on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from coldframe.loader.errors import ReplicaError
from coldframe.loader.wire import Channel, Message

__all__ = ["FrontLink"]


class FrontLink:
    """Messages to and from the front.

    Args:
        channel: The socket.
        on_message: Called for each message.
        on_end: Called once, when the front is gone.
    """

    def __init__(
        self,
        channel: Channel,
        on_message: Callable[[Message], None],
        on_end: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._on_message = on_message
        self._on_end = on_end
        self._unsent = bytearray()
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(channel.fileno(), self._read)
        self._loop.call_soon(self._read_buffered)

    def send(self, body: dict[str, Any]) -> None:
        """Sends a message, now or as soon as there is room; nothing where the front is gone."""
        if self._ended:
            return
        waiting = bool(self._unsent)
        self._unsent += Channel.frame(body)
        if not waiting:
            self._write()

    def close(self) -> None:
        """Says and hears nothing more."""
        if not self._ended:
            self._ended = True
            self._loop.remove_reader(self._channel.fileno())
            self._loop.remove_writer(self._channel.fileno())
            self._channel.close()

    def _write(self) -> None:
        try:
            with memoryview(self._unsent) as view:
                sent = self._channel.send_some(view)
        except ReplicaError:
            self._end()
            return
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._channel.fileno(), self._write)
        else:
            self._loop.remove_writer(self._channel.fileno())

    def _read_buffered(self) -> None:
        for message in self._channel.buffered():
            self._on_message(message)

    def _read(self) -> None:
        messages, ended = self._channel.receive_ready()
        for message in messages:
            self._on_message(message)
        if ended:
            self._end()

    def _end(self) -> None:
        if not self._ended:
            self.close()
            self._on_end()
