"""The socket to the front: neither side holds the other up."""

from __future__ import annotations

import asyncio
import threading

from coldframe.loader.errors import ReplicaError
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.gateway.link import FrontLink

LARGE = "x" * 100_000


def test_both_send_more_than_the_socket_holds() -> None:
    ours, theirs = Channel.pair()
    heard: list[int] = []

    def front() -> None:
        # It blocks in `send`, as the front does, and only then reads.
        for number in range(50):
            theirs.send({"type": "tokens", "number": number, "text": LARGE})
        while len(heard) < 50:
            message = theirs.recv(10)
            assert message is not None
            heard.append(message.body["number"])

    async def gateway() -> list[int]:
        got: list[int] = []
        done = asyncio.Event()

        def take(message: Message) -> None:
            got.append(message.body["number"])
            if len(got) == 50:
                done.set()

        link = FrontLink(ours, take, lambda: None)
        for number in range(50):
            link.send({"type": "submit", "number": number, "text": LARGE})
        await asyncio.wait_for(done.wait(), 20)
        while thread.is_alive():
            await asyncio.sleep(0.005)
        link.close()
        return got

    thread = threading.Thread(target=front)
    thread.start()
    assert asyncio.run(gateway()) == list(range(50))
    thread.join()
    assert heard == list(range(50))
    theirs.close()


def test_what_was_read_before_is_not_lost() -> None:
    ours, theirs = Channel.pair()
    for number in range(3):
        theirs.send({"type": "x", "number": number})
    first = ours.recv(5)
    assert first is not None

    async def gateway() -> list[int]:
        got: list[int] = []
        link = FrontLink(ours, lambda message: got.append(message.body["number"]), lambda: None)
        while len(got) < 2:
            await asyncio.sleep(0.001)
        link.close()
        return got

    assert asyncio.run(asyncio.wait_for(gateway(), 10)) == [1, 2]
    theirs.close()


def test_the_end_of_the_front_is_told_once() -> None:
    ours, theirs = Channel.pair()

    async def gateway() -> int:
        ends: list[int] = []
        link = FrontLink(ours, lambda _: None, lambda: ends.append(1))
        theirs.close()
        while not ends:
            await asyncio.sleep(0.001)
        link.send({"type": "nobody hears it"})
        await asyncio.sleep(0.01)
        return len(ends)

    assert asyncio.run(asyncio.wait_for(gateway(), 10)) == 1


def test_a_front_that_is_gone_is_noticed_by_sending() -> None:
    ours, theirs = Channel.pair()
    theirs.close()
    try:
        ours.send_some(memoryview(b"x"))
    except ReplicaError:
        ours.close()
    else:
        raise AssertionError("nobody was there")
