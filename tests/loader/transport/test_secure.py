"""Connections behind the handshake: real sockets, and whoever sits in between."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.loader.errors import TransferBroken, TransferDenied
from coldframe.loader.transport import handshake
from coldframe.loader.transport.base import parse_address
from coldframe.loader.transport.handshake import dial, greet, welcome
from coldframe.loader.transport.secret import read_secret
from coldframe.loader.transport.secure import SecureSocket
from tests.support import no_threads_left

SECRET = b"a secret that both of them have"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with no_threads_left():
        ours, theirs = socket.socketpair()
        ours.settimeout(20)
        theirs.settimeout(20)
        with ours, theirs:
            yield ours, theirs


class Side:
    """One side's part, in a thread of its own."""

    def __init__(self, part: Callable[[], SecureSocket]) -> None:
        self.found: SecureSocket | None = None
        self.error: Exception | None = None

        def run() -> None:
            try:
                self.found = part()
            except Exception as error:  # noqa: BLE001 - raised where it is joined
                self.error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def join(self) -> SecureSocket:
        self._thread.join(20)
        if self.error is not None:
            raise self.error
        assert self.found is not None
        return self.found


def met(ends: tuple[socket.socket, socket.socket]) -> tuple[SecureSocket, SecureSocket]:
    ours, theirs = ends
    server = Side(lambda: welcome(theirs, SECRET, "kv"))
    client = greet(ours, SECRET, "kv")
    ours.settimeout(20)
    return client, server.join()


def test_both_sides_say_what_they_have_to(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = met(ends)
    ends[1].settimeout(20)
    for number in range(3):
        client.send({"number": number, "text": "ä" * 1000})
        assert server.recv() == {"number": number, "text": "ä" * 1000}
        server.send({"back": number})
    assert [client.recv() for _ in range(3)] == [{"back": number} for number in range(3)]
    ends[0].shutdown(socket.SHUT_RDWR)
    assert server.recv() is None


def test_bytes_between_messages_come_as_they_are(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    client, server = met(ends)
    data = os.urandom(300_000)

    def send() -> SecureSocket:
        server.send({"nbytes": len(data)})
        server.sock.settimeout(20)
        hashed = server.keyed(outgoing=True)
        server.sock.sendall(data)
        hashed.update(data)
        server.sock.sendall(hashed.digest())
        server.send({"behind": True})
        return server

    sending = Side(send)
    assert client.recv() == {"nbytes": len(data)}
    got, proof = bytearray(len(data)), bytearray(32)
    client.recv_into(memoryview(got))
    client.recv_into(memoryview(proof))
    assert client.recv() == {"behind": True}
    sending.join()
    assert got == data
    hashed = client.keyed(outgoing=False)
    hashed.update(got)
    assert hashed.digest() == proof
    assert client.keyed(outgoing=True).digest() != client.keyed(outgoing=False).digest()


@pytest.mark.parametrize(
    ("secret", "purpose"), [(b"another secret than theirs", "kv"), (SECRET, "decode")]
)
def test_who_knows_another_secret_or_wants_something_else_is_sent_away(
    secret: bytes, purpose: str, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = ends

    def serve() -> SecureSocket:
        try:
            return welcome(theirs, SECRET, "kv")
        finally:
            theirs.shutdown(socket.SHUT_RDWR)

    server = Side(serve)
    with pytest.raises(TransferDenied):
        greet(ours, secret, purpose)
    with pytest.raises(TransferDenied):
        server.join()


def test_a_server_that_does_not_know_the_secret_learns_nothing_and_is_not_believed(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends

    def pretend() -> SecureSocket:
        said = theirs.recv(4096)
        theirs.sendall(os.urandom(32))
        proof = theirs.recv(4096)
        assert SECRET not in said + proof
        theirs.sendall(proof)  # what it has heard is of no use to it
        return SecureSocket(theirs, b"", b"")

    server = Side(pretend)
    with pytest.raises(TransferDenied, match="does not know"):
        greet(ours, SECRET, "kv")
    server.join()


def test_a_silent_stranger_is_given_up(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "_HANDSHAKE_S", 0.1)
    ends[0].sendall(b"cold")
    with pytest.raises(TransferBroken):
        welcome(ends[1], SECRET, "kv")


def between(ends: tuple[socket.socket, socket.socket]) -> tuple[SecureSocket, SecureSocket, bytes]:
    """Two sides, and a message of the first one's as it is on the wire, which nobody has read."""
    client, server = met(ends)
    client.send({"do": "blocks"})
    return client, server, ends[1].recv(4096)


def test_a_message_cannot_be_changed(ends: tuple[socket.socket, socket.socket]) -> None:
    _, server, wire = between(ends)
    for place in range(len(wire)):
        changed = bytearray(wire)
        changed[place] ^= 1
        again = _copy(server)
        again.feed(bytes(changed))
        try:
            assert again.pending() is None  # a longer one: the rest is missing
        except TransferBroken:
            continue
        assert place < 4


def test_a_message_cannot_be_repeated_or_left_out(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    client, server, first = between(ends)
    client.send({"do": "taken"})
    second = ends[1].recv(4096)
    repeated = _copy(server)
    repeated.feed(first + first)
    assert repeated.pending() == {"do": "blocks"}
    with pytest.raises(TransferBroken, match="changed"):
        repeated.pending()
    left_out = _copy(server)
    left_out.feed(second)
    with pytest.raises(TransferBroken, match="changed"):
        left_out.pending()
    back = _copy(client)  # nor sent back to who has said it
    back.feed(first)
    with pytest.raises(TransferBroken, match="changed"):
        back.pending()


def test_a_message_that_is_too_long_ends_it(ends: tuple[socket.socket, socket.socket]) -> None:
    _, server = met(ends)
    ends[0].sendall(b"\xff\xff\xff\xff")
    with pytest.raises(TransferBroken, match="too long"):
        server.recv()


def test_under_a_selector_nonsense_ends_it(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = met(ends)
    client.send({"a": 1})
    client.send({"a": 2})
    found: list[dict[str, object]] = []
    while len(found) < 2:
        messages, ended = server.receive_ready()
        assert not ended
        found += messages
    assert found == [{"a": 1}, {"a": 2}]
    ends[0].sendall(b"\0\0\0\2" + b"x" * 50)
    assert server.receive_ready() == ([], True)


class _Reader(SecureSocket):
    """What a side would make of bytes."""

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def pending(self) -> dict[str, object] | None:
        return self._next()


def _copy(side: SecureSocket) -> _Reader:
    return _Reader(side.sock, *side._keys)


def test_the_secret_is_read_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    assert read_secret({}) is None
    assert read_secret({"COLDFRAME_KV_SECRET": ""}) is None
    assert read_secret({"COLDFRAME_KV_SECRET": SECRET.decode()}) == SECRET
    assert read_secret({"COLDFRAME_KV_SECRET_FILE": str(file)}) == SECRET
    both = {"COLDFRAME_KV_SECRET_FILE": str(file), "COLDFRAME_KV_SECRET": "x" * 40}
    assert read_secret(both) == SECRET


@pytest.mark.parametrize("secret", ["short", " " * 40, "x" * 5000])
def test_what_is_no_secret_is_refused(secret: str) -> None:
    with pytest.raises(TransferDenied, match="no secret"):
        read_secret({"COLDFRAME_KV_SECRET": secret})


def test_a_secret_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TransferDenied, match="cannot be read"):
        read_secret({"COLDFRAME_KV_SECRET_FILE": str(tmp_path / "none")})


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(TransferBroken, match="cannot be reached"):
            dial(f"127.0.0.1:{taken.getsockname()[1]}", SECRET, "kv", timeout_s=5)
    with pytest.raises(TransferBroken, match="no address"):
        dial("127.0.0.1", SECRET, "kv", timeout_s=5)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("h:1", ("h", 1)),
        ("127.0.0.1:65535", ("127.0.0.1", 65535)),
        ("[::1]:80", ("::1", 80)),
        ("::1:80", None),
        ("h:65536", None),
        ("h:", None),
        (":80", None),
        ("h", None),
        ("h:-1", None),
    ],
)
def test_addresses(text: str, found: tuple[str, int] | None) -> None:
    assert parse_address(text) == found
