"""Messages that are held back for a connection, and sent in their order."""

from __future__ import annotations

import os

from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.wire import Channel, Message


def ready(channel: Channel) -> list[Message]:
    """All that has come by now."""
    found: list[Message] = []
    while channel.wait_readable(0):
        found += channel.receive_ready()[0]
    return found


def test_what_is_held_back_comes_in_its_order_with_what_came_beside_it() -> None:
    ours, theirs = Channel.pair()
    connection = Connection("w", ours)
    read, write = os.pipe()
    before = len(os.listdir("/proc/self/fd"))
    connection.send({"type": "first"})
    connection.hold()
    connection.send({"type": "second"}, (write,))
    connection.send({"type": "third"})
    os.close(write)  # its owner may let it go meanwhile
    assert [message.kind for message in ready(theirs)] == ["first"]
    connection.release()
    connection.send({"type": "fourth"})
    second, third, fourth = ready(theirs)
    assert (second.kind, third.kind, fourth.kind) == ("second", "third", "fourth")
    os.write(second.fds[0], b"x")
    assert os.read(read, 1) == b"x"
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(second.fds[0])
    os.close(read)
    connection.close()
    theirs.close()


def test_what_is_still_held_back_at_the_end_leaves_nothing() -> None:
    ours, theirs = Channel.pair()
    before = len(os.listdir("/proc/self/fd"))
    connection = Connection("w", ours)
    connection.hold()
    connection.send({"type": "never"}, (0,))
    connection.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1
    assert theirs.receive_ready() == ([], True)
    theirs.close()
