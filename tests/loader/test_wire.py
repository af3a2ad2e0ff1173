from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import ReplicaError
from coldframe.loader.wire import MAX_FDS, Channel


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    before = open_fds()
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()
    assert open_fds() == before


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A bare socket, to send what a channel would not, and the channel at its other end."""
    before = open_fds()
    left, right = socket.socketpair()
    channel = Channel(right)
    yield left, channel
    left.close()
    channel.close()
    assert open_fds() == before


def frame(body: Any) -> bytes:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return struct.pack(">I", len(payload)) + payload


def body_of(channel: Channel) -> dict[str, Any]:
    message = channel.recv(timeout=10)
    assert message is not None
    assert message.fds == ()
    return message.body


def same_file(one: int, other: int) -> bool:
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def test_a_message_arrives_as_it_was_sent(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    body = {"type": "stage", "stage": 3, "text": "Grüße\n\0", "list": [1, None, 2.5, True]}
    ours.send(body)
    message = theirs.recv(timeout=10)
    assert message is not None
    assert message.kind == "stage"
    assert message.body == body
    theirs.send({"type": "thanks"})
    assert body_of(ours) == {"type": "thanks"}


def test_the_frame_is_a_length_and_json(raw: tuple[socket.socket, Channel]) -> None:
    bare, channel = raw
    channel.send({"type": "x"})
    assert bare.recv(100) == b"\0\0\0\x0c" + b'{"type":"x"}'


def test_a_frame_in_pieces_is_one_message(raw: tuple[socket.socket, Channel]) -> None:
    bare, channel = raw
    data = frame({"type": "a", "n": 1}) + frame({"type": "b"})
    for index in range(len(data)):
        bare.sendall(data[index : index + 1])
        messages, ended = channel.receive_ready()
        assert not ended
        whole = index + 1 in (len(frame({"type": "a", "n": 1})), len(data))
        assert len(messages) == (1 if whole else 0)


def test_many_messages_in_one_read_keep_their_order(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    for n in range(200):
        ours.send({"type": "n", "n": n})
    messages, ended = theirs.receive_ready()
    while len(messages) < 200:
        more, ended = theirs.receive_ready()
        messages += more
    assert [m.body["n"] for m in messages] == list(range(200))
    assert not ended


def test_a_large_message_passes(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    text = "x" * 5_000_000
    sender = threading.Thread(target=ours.send, args=({"type": "big", "text": text},))
    sender.start()
    assert body_of(theirs)["text"] == text
    sender.join()


def test_threads_that_send_at_once_do_not_mix_their_frames(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair

    def send(who: int) -> None:
        for n in range(40):
            ours.send({"type": "t", "who": who, "n": n, "pad": "x" * 20_000})

    threads = [threading.Thread(target=send, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {0: [], 1: []}
    for _ in range(80):
        body = body_of(theirs)
        assert len(body["pad"]) == 20_000
        seen[body["who"]].append(body["n"])
    for thread in threads:
        thread.join()
    assert seen == {0: list(range(40)), 1: list(range(40))}


def test_descriptors_come_with_their_message(pair: tuple[Channel, Channel], tmp_path: Path) -> None:
    ours, theirs = pair
    sent = [os.open(tmp_path / str(n), os.O_CREAT | os.O_RDWR) for n in range(5)]
    ours.send({"type": "none"})
    ours.send({"type": "two"}, sent[:2])
    ours.send({"type": "none"})
    ours.send({"type": "three"}, sent[2:])
    got: list[int] = []
    for kind, count in (("none", 0), ("two", 2), ("none", 0), ("three", 3)):
        message = theirs.recv(timeout=10)
        assert message is not None
        assert message.body == {"type": kind}
        assert len(message.fds) == count
        got += message.fds
    assert all(same_file(a, b) for a, b in zip(sent, got, strict=True))
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in got)
    for fd in [*sent, *got]:
        os.close(fd)


def test_as_many_descriptors_as_a_message_may_have(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    fd = os.open("/dev/null", os.O_RDONLY)
    # A body larger than the socket's buffer: the descriptors come with its first part only.
    sender = threading.Thread(
        target=ours.send, args=({"type": "many", "pad": "x" * 1_000_000}, [fd] * MAX_FDS)
    )
    sender.start()
    message = theirs.recv(timeout=10)
    sender.join()
    assert message is not None
    assert len(message.fds) == MAX_FDS
    assert all(same_file(fd, got) for got in message.fds)
    for got in [fd, *message.fds]:
        os.close(got)


def test_descriptors_that_nobody_took_are_closed_with_the_channel(
    raw: tuple[socket.socket, Channel],
) -> None:
    bare, channel = raw
    fd = os.open("/dev/null", os.O_RDONLY)
    whole = frame({"type": "a"}) + frame({"type": "b", "fds": 2})
    socket.send_fds(bare, [whole], [fd, fd])
    assert body_of(channel) == {"type": "a"}
    socket.send_fds(bare, [frame({"type": "half", "fds": 1})[:-1]], [fd])
    os.close(fd)
    before = open_fds()
    channel.close()
    assert open_fds() == before - 1 - 2  # the other end has not read the half


def test_descriptors_of_half_a_message_are_closed_with_the_channel(
    raw: tuple[socket.socket, Channel],
) -> None:
    bare, channel = raw
    fd = os.open("/dev/null", os.O_RDONLY)
    socket.send_fds(bare, [frame({"type": "half", "fds": 1})[:-1]], [fd])
    os.close(fd)
    before = open_fds()
    with pytest.raises(TimeoutError):
        channel.recv(timeout=0.05)
    assert open_fds() == before + 1
    channel.close()
    assert open_fds() == before - 1


def test_the_end_of_the_stream_comes_after_the_last_message(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send({"type": "last words"})
    ours.close()
    assert body_of(theirs) == {"type": "last words"}
    assert theirs.recv(timeout=10) is None
    assert theirs.recv() is None
    assert theirs.receive_ready() == ([], True)


def test_half_a_message_is_none(raw: tuple[socket.socket, Channel]) -> None:
    bare, channel = raw
    bare.sendall(frame({"type": "x"})[:-1])
    bare.close()
    assert channel.recv(timeout=10) is None


def test_sending_to_nobody_is_an_error(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ReplicaError, match="message 'x', got Broken pipe"):
        ours.send({"type": "x"})
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ReplicaError):
        ours.send({"type": "x"}, [fd])
    os.close(fd)


@pytest.mark.heavy
def test_sending_to_who_never_reads_ends_in_an_error(pair: tuple[Channel, Channel]) -> None:
    ours, _ = pair
    ours.set_send_timeout(1)
    with pytest.raises(ReplicaError, match="no longer reads"):
        ours.send({"type": "x", "pad": "x" * 5_000_000})


def test_nobody_there(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    before = open_fds()
    with pytest.raises(ReplicaError, match=f"cannot reach.*{path}"):
        Channel.connect(path)
    assert open_fds() == before


def test_a_wait_ends_in_time_even_if_bytes_trickle_in(raw: tuple[socket.socket, Channel]) -> None:
    bare, channel = raw
    with pytest.raises(TimeoutError):
        channel.recv(timeout=0)
    stop = threading.Event()

    def trickle() -> None:
        for byte in frame({"type": "x", "pad": "x" * 1000}):
            if stop.wait(0.01):
                return
            bare.sendall(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(TimeoutError):  # the whole frame takes ten seconds
        channel.recv(timeout=0.1)
    stop.set()
    thread.join()


def test_hanging_up_wakes_the_reader(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    got: list[object] = []
    reader = threading.Thread(target=lambda: got.append(ours.recv()))
    reader.start()
    ours.hang_up()
    reader.join(10)
    assert got == [None]
    assert theirs.recv(timeout=10) is None
    theirs.close()
    ours.hang_up()  # once more, with nobody there, is no error


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff\xff\xff\xff",
        frame(b"{"),
        frame(b"\xff\xfe"),
        frame(b"[" * 100_000),
        frame([1, 2]),
        frame("text"),
        frame({"type": "x", "fds": 1}),
        frame({"type": "x", "fds": -1}),
        frame({"type": "x", "fds": "1"}),
        frame(b""),
    ],
    ids=["length", "json", "utf8", "deep", "list", "string", "fds", "minus", "text", "empty"],
)
def test_nonsense_ends_the_stream(nonsense: bytes, raw: tuple[socket.socket, Channel]) -> None:
    bare, channel = raw
    bare.sendall(frame({"type": "sense"}) + nonsense + frame({"type": "more"}))
    assert body_of(channel) == {"type": "sense"}
    assert channel.recv(timeout=10) is None


def test_more_descriptors_than_a_message_may_have_end_the_stream(
    raw: tuple[socket.socket, Channel],
) -> None:
    bare, channel = raw
    fd = os.open("/dev/null", os.O_RDONLY)
    socket.send_fds(bare, [frame({"type": "x", "fds": 240})], [fd] * 240)
    os.close(fd)
    assert channel.recv(timeout=10) is None


def test_a_channel_over_an_inherited_descriptor(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    moved = Channel.from_fd(os.dup(theirs.fileno()))
    ours.send({"type": "x"})
    assert body_of(moved) == {"type": "x"}
    fd = moved.detach()
    os.close(fd)
