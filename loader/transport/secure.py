"""Connections between hosts: both sides prove that they know one secret, and no message can be
forged behind that.

    client  greeting, purpose, nonce
    server  nonce
    client  HMAC-SHA256(secret, "client" + all of that)
    server  the same with "server"

From there on a message is a length, one JSON object, and 16 bytes of BLAKE2b over both, keyed for
this connection and direction, with the number of the message in it: none can be changed, repeated,
left out or put in. Blocks of KV between messages are as they are; who wants them checked has their
keyed hash sent behind them (`keyed`).

Nothing is encrypted: who can listen to the network reads prompts, answers and KV, and may guess
at a secret that is short. So it has at least 16 bytes, and networks that others listen to are for
a tunnel or a mesh to protect.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from coldframe.loader.errors import TransferBroken, TransferDenied
from coldframe.loader.transport.base import parse_address

__all__ = [
    "SECRET",
    "SECRET_FILE",
    "SecureSocket",
    "dial",
    "greet",
    "read_secret",
    "welcome",
]

SECRET_FILE = "COLDFRAME_KV_SECRET_FILE"
SECRET = "COLDFRAME_KV_SECRET"
_GREETING = b"coldframe-kv/1\r\n"
_PURPOSE_BYTES = 8
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_TAG_BYTES = 16
_LEAST_SECRET = 16
_MOST_SECRET = 4096
_HANDSHAKE_S = 5.0
_LENGTH = struct.Struct(">I")
_READ = 256 << 10


def read_secret(environ: Mapping[str, str] | None = None) -> bytes | None:
    """The secret that this machine shares with those it gives KV to, or takes it from.

    Returns:
        None where there is none.

    Raises:
        TransferDenied: It cannot be read, or is too short to be one.
    """
    environ = os.environ if environ is None else environ
    path, text = environ.get(SECRET_FILE) or None, environ.get(SECRET) or None
    if path is None and text is None:
        return None
    if path is None:
        found, where = str(text).encode().strip(), SECRET
    else:
        where = path
        try:
            with open(path, "rb") as file:
                found = file.read(_MOST_SECRET + 1).strip()
        except OSError as error:
            raise TransferDenied(
                "the secret for KV cannot be read", where=where, got=error.strerror
            ) from None
    if not _LEAST_SECRET <= len(found) <= _MOST_SECRET:
        raise TransferDenied(
            "this is no secret for KV",
            where=where,
            expected=f"{_LEAST_SECRET} to {_MOST_SECRET} bytes",
            got=f"{len(found)} bytes",
            hint="Make one with `openssl rand -hex 32`, the same on both sides.",
        )
    return found


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
        return blake2b(key=self._keys[not outgoing], digest_size=_PROOF_BYTES, person=b"blocks")

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
            raise _broken(error) from error

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
                raise _broken(error) from error
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
                raise _broken(error) from error
            if not count:
                raise TransferBroken(
                    "the other side is gone", expected=len(view), got=f"{ready} bytes"
                )
            ready += count

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


def dial(
    address: str, secret: bytes, purpose: str, *, timeout_s: float, most: int = 1 << 20
) -> SecureSocket:
    """A connection to a listener, behind the handshake.

    Args:
        address: `HOST:PORT`.
        secret: That of both.
        purpose: What for; the listener knows it, too.
        timeout_s: For the connection, and then for each read or write.
        most: See `SecureSocket`.

    Raises:
        TransferBroken: It cannot be reached.
        TransferDenied: It does not know the secret, or does not believe that we do.
    """
    place = parse_address(address)
    if place is None:
        raise TransferBroken("this is no address", got=address, expected="HOST:PORT")
    try:
        sock = socket.create_connection(place, timeout_s)
    except (OSError, UnicodeError) as error:
        raise TransferBroken(
            "cannot be reached",
            where=address,
            got=getattr(error, "strerror", None) or str(error),
        ) from None
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found = greet(sock, secret, purpose, most=most)
        sock.settimeout(timeout_s)
    except BaseException:
        sock.close()
        raise
    return found


def greet(sock: socket.socket, secret: bytes, purpose: str, *, most: int = 1 << 20) -> SecureSocket:
    """The client's side of the handshake.

    Raises:
        TransferDenied: The server ended it, or does not know the secret.
        TransferBroken: It did not answer in time.
    """
    deadline = time.monotonic() + _HANDSHAKE_S
    said = _GREETING + _padded(purpose) + secrets.token_bytes(_NONCE_BYTES)
    try:
        sock.settimeout(_HANDSHAKE_S)
        sock.sendall(said)
        said += _exactly(sock, _NONCE_BYTES, deadline)
        sock.sendall(_proof(secret, b"client", said))
        proof = _exactly(sock, _PROOF_BYTES, deadline)
    except _Ended:
        raise TransferDenied(
            "the other side ended the handshake", expected="the same secret and purpose there"
        ) from None
    except OSError as error:
        raise _broken(error) from error
    if not hmac.compare_digest(proof, _proof(secret, b"server", said)):
        raise TransferDenied("the other side does not know the secret")
    return SecureSocket(sock, _key(secret, b"up", said), _key(secret, b"down", said), most)


def welcome(
    sock: socket.socket, secret: bytes, purpose: str, *, most: int = 1 << 20
) -> SecureSocket:
    """The server's side of the handshake; it takes `_HANDSHAKE_S` at most.

    Raises:
        TransferDenied: The client is none, or does not know the secret.
        TransferBroken: It went, or took too long.
    """
    deadline = time.monotonic() + _HANDSHAKE_S
    try:
        said = _exactly(sock, len(_GREETING) + _PURPOSE_BYTES + _NONCE_BYTES, deadline)
        if not said.startswith(_GREETING + _padded(purpose)):
            raise TransferDenied("somebody came who wants something else")
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sock.sendall(nonce)
        said += nonce
        proof = _exactly(sock, _PROOF_BYTES, deadline)
        if not hmac.compare_digest(proof, _proof(secret, b"client", said)):
            raise TransferDenied("somebody came who does not know the secret")
        sock.sendall(_proof(secret, b"server", said))
    except (_Ended, OSError) as error:
        raise _broken(error) from error
    return SecureSocket(sock, _key(secret, b"down", said), _key(secret, b"up", said), most)


class _Ended(Exception):
    """The other side has ended the connection."""


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        more = sock.recv(count - len(data))
        if not more:
            raise _Ended
        data += more
    return data


def _padded(purpose: str) -> bytes:
    return purpose.encode().ljust(_PURPOSE_BYTES, b"\0")[:_PURPOSE_BYTES]


def _proof(secret: bytes, side: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, side + said, "sha256")


def _key(secret: bytes, direction: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, b"key " + direction + said, "sha256")


def _tag(key: bytes, number: int, head: bytes, payload: bytes) -> bytes:
    found = blake2b(number.to_bytes(8, "big"), key=key, digest_size=_TAG_BYTES, person=b"message")
    found.update(head)
    found.update(payload)
    return found.digest()


def _broken(error: Exception) -> TransferBroken:
    late = isinstance(error, TimeoutError)
    got = "no answer in time" if late else getattr(error, "strerror", None) or str(error)
    return TransferBroken("the connection broke", got=got or "it ended")
