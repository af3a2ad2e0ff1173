"""The loop that the desks share: who talks nonsense harms only itself, and threads may post."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.loader.arena import Segment
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.wire import MAX_FDS, Channel, Message

PATIENCE_S = 30.0


class Running:
    """A reactor in a thread, with this test as its owner; it answers each message with `heard`."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = str(tmp_path / "s")
        self.gone: list[str] = []
        self.owner, theirs = Channel.pair()
        self.reactor = Reactor(
            theirs, on_message=self._answer, on_gone=lambda client: self.gone.append(client.key)
        )
        self.reactor.listen(self.path)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.reactor.run(each_round=lambda: None, each_second=lambda: None)
        self.reactor.close()

    def _answer(self, client: Connection, message: Message) -> None:
        if message.kind == "nonsense":
            raise ValueError("what is that")
        client.attached = message.kind == "hello"
        self.reactor.send(client, {"type": "heard", "key": client.key})

    def do(self, action: Callable[[], None]) -> None:
        """Something done by the loop, from here."""
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        self.reactor.post(act)
        assert done.wait(PATIENCE_S)

    def close(self) -> None:
        self.owner.close()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    made.close()


def hear(channel: Channel) -> Message:
    message = channel.recv(PATIENCE_S)
    assert message is not None
    return message


def test_who_talks_nonsense_harms_only_itself(
    running: Running, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = Channel.connect(running.path), Channel.connect(running.path)
    one.send({"type": "nonsense"})
    assert one.recv(PATIENCE_S) is None
    running.do(lambda: None)  # by then it has said who is gone
    assert running.gone == ["client-1"]
    assert "what is that" in capfd.readouterr().err
    two.send({"type": "hello"})
    assert hear(two).body["key"] == "client-2"
    running.owner.send({"type": "hello"})
    assert hear(running.owner).body["key"] == "owner"
    one.close()
    two.close()


def test_segments_go_out_in_as_many_messages_as_it_takes(running: Running) -> None:
    worker = Channel.connect(running.path)
    worker.send({"type": "hello"})
    hear(worker)
    fd = os.memfd_create("segment")
    segments = [Segment(fd, 4096 * number, 4096, 0, False) for number in range(MAX_FDS + 1)]

    def send() -> None:
        (connection,) = [each for each in running.reactor.workers if each.key == "client-1"]
        running.reactor.send_segments(connection, "segments", segments, {"more": 7})

    running.do(send)
    first, second = hear(worker), hear(worker)
    assert [len(first.fds), len(second.fds)] == [MAX_FDS, 1]
    assert [first.body["last"], second.body["last"]] == [False, True]
    assert [first.body["more"], second.body["more"]] == [7, 7]
    found = first.body["segments"] + second.body["segments"]
    assert found == [segment.to_wire() for segment in segments]
    for fd_here in (fd, *first.fds, *second.fds):
        os.close(fd_here)
    worker.close()


def test_what_is_held_back_waits_for_its_worker_alone(running: Running) -> None:
    one, two = Channel.connect(running.path), Channel.connect(running.path)
    for channel in (one, two):
        channel.send({"type": "hello"})
        hear(channel)

    def name() -> None:
        for connection in running.reactor.workers:
            connection.name = connection.key
        running.reactor.hold("client-1", True)
        for connection in running.reactor.workers:
            running.reactor.send(connection, {"type": "news"})

    running.do(name)
    assert hear(two).kind == "news"
    with pytest.raises(TimeoutError):
        one.recv(0.05)
    running.do(lambda: running.reactor.hold("client-1", False))
    assert hear(one).kind == "news"
    one.close()
    two.close()


def test_it_ends_with_its_owner(running: Running) -> None:
    worker = Channel.connect(running.path)
    worker.send({"type": "hello"})
    hear(worker)
    running.close()
    assert worker.recv(PATIENCE_S) is None
    worker.close()
