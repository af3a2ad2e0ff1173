"""How a connection between hosts begins: both sides prove that they know one secret.

    client  greeting, purpose, nonce
    server  nonce
    client  HMAC-SHA256(secret, "client" + all of that)
    server  the same with "server"

What comes behind that is `secure`'s. A secret that is short can be guessed from this, by who hears
it: so it has at least 16 bytes.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time

from coldframe.loader.errors import TransferBroken, TransferDenied
from coldframe.loader.transport.base import parse_address
from coldframe.loader.transport.secure import SecureSocket, broken

__all__ = ["dial", "greet", "welcome"]

_GREETING = b"coldframe-kv/1\r\n"
_PURPOSE_BYTES = 8
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HANDSHAKE_S = 5.0


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
        raise broken(error) from error
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
        raise broken(error) from error
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
