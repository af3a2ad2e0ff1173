"""Connections between hosts behind their `handshake`: no message can be forged.

A message is a length, one JSON object, and 16 bytes of BLAKE2b over both, keyed for this connection
and direction, with the number of the message in it: none can be changed, repeated, left out or put
in. Blocks of KV between messages are as they are; who wants them checked has their keyed hash sent
behind them (`keyed`).

Nothing is encrypted: who can listen to the network reads prompts, answers and KV. Networks that
others listen to are for a tunnel or a mesh to protect.
"""

from __future__ import annotations

import hmac
import json
import socket
import struct
import threading
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from coldframe.loader.errors import TransferBroken

__all__ = ["SecureSocket", "broken"]

_HASH_BYTES = 32
_TAG_BYTES = 16
_LENGTH = struct.Struct(">I")
_READ = 256 << 10


class SecureSocket:
    """A connection behind the handshake.

    `send` may be called from any thread. Reading belongs to one: either `recv` and `recv_into`,
    which wait as long as the socket's timeout says, or `receive_ready` under a selector.

    Args:
        sock: The connection.
        outgoing: The key of what goes out.
        incoming: That of what comes in.
        most: Bytes that a message may have.
    """

    def __init__(
        self, sock: socket.socket, outgoing: bytes, incoming: bytes, most: int = 1 << 20
    ) -> None:
        self.sock = sock
        self._keys = (outgoing, incoming)
        self._most = most
        self._sent = self._received = 0
        self._lock = threading.Lock()
        self._buffer = bytearray()
        self._ended = False

    def fileno(self) -> int:
        return self.sock.fileno()

    def keyed(self, *, outgoing: bool) -> blake2b:
        """A hash of bytes that nobody else can make, for what goes between messages."""
        return blake2b(key=self._keys[not outgoing], digest_size=_HASH_BYTES, person=b"blocks")

    def send(self, body: Mapping[str, Any]) -> None:
        """Sends a message.

        Raises:
            TransferBroken: The other side is gone or reads no more.
        """
        payload = json.dumps(body, separators=(",", ":")).encode()
        head = _LENGTH.pack(len(payload))
        try:
            with self._lock:
                tag = _tag(self._keys[0], self._sent, head, payload)
                self._sent += 1
                self.sock.sendall(head + payload + tag)
        except OSError as error:
            raise broken(error) from error

    def recv(self) -> dict[str, Any] | None:
        """The next message, or None at the end.

        Raises:
            TransferBroken: Nothing came in time, or what came is none.
        """
        while (body := self._next()) is None:
            if self._ended:
                return None
            try:
                data = self.sock.recv(_READ)
            except OSError as error:
                raise broken(error) from error
            self._buffer += data
            self._ended = not data
        return body

    def receive_ready(self) -> tuple[list[dict[str, Any]], bool]:
        """Reads once, after a selector said so: the complete messages, and whether it ended.

        What is no message ends it, too.
        """
        try:
            data = self.sock.recv(_READ, socket.MSG_DONTWAIT)
        except (BlockingIOError, TimeoutError):
            return [], self._ended
        except OSError:
            data = b""
        self._buffer += data
        self._ended = self._ended or not data
        found: list[dict[str, Any]] = []
        try:
            while (body := self._next()) is not None:
                found.append(body)
        except TransferBroken:
            self._ended = True
        return found, self._ended

    def recv_into(self, view: memoryview) -> None:
        """Fills memory with bytes that stand between messages.

        Raises:
            TransferBroken: They did not come.
        """
        ready = min(len(self._buffer), len(view))
        if ready:
            view[:ready] = self._buffer[:ready]
            del self._buffer[:ready]
        while ready < len(view):
            try:
                count = self.sock.recv_into(view[ready:])
            except OSError as error:
                raise broken(error) from error
            if not count:
                raise TransferBroken(
                    "the other side is gone", expected=len(view), got=f"{ready} bytes"
                )
            ready += count

    def has_ended(self) -> bool:
        """Whether the other side has hung up, where it says nothing unless it is asked."""
        import select

        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def hang_up(self) -> None:
        """Ends it, and wakes who reads or writes. Any thread may do so."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was first
            return

    def close(self) -> None:
        self._ended = True
        self.sock.close()

    def _next(self) -> dict[str, Any] | None:
        """The next message of those that are here."""
        if len(self._buffer) < _LENGTH.size:
            return None
        head = bytes(self._buffer[: _LENGTH.size])
        (length,) = _LENGTH.unpack(head)
        if length > self._most:
            raise TransferBroken("a message is too long", expected=self._most, got=length)
        end = _LENGTH.size + length
        if len(self._buffer) < end + _TAG_BYTES:
            return None
        payload = bytes(self._buffer[_LENGTH.size : end])
        tag = _tag(self._keys[1], self._received, head, payload)
        if not hmac.compare_digest(tag, bytes(self._buffer[end : end + _TAG_BYTES])):
            raise TransferBroken("a message was changed on its way")
        self._received += 1
        del self._buffer[: end + _TAG_BYTES]
        try:
            body = json.loads(payload)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise TransferBroken("a message is no JSON object")
        return body


def _tag(key: bytes, number: int, head: bytes, payload: bytes) -> bytes:
    found = blake2b(number.to_bytes(8, "big"), key=key, digest_size=_TAG_BYTES, person=b"message")
    found.update(head)
    found.update(payload)
    return found.digest()


def broken(error: Exception) -> TransferBroken:
    """What a failure of the socket is for who waits for the other side."""
    late = isinstance(error, TimeoutError)
    got = "no answer in time" if late else getattr(error, "strerror", None) or str(error)
    return TransferBroken("the connection broke", got=got or "it ended")
