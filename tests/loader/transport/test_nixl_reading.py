"""A sender that ends while its KV is read by NIXL: an error of its own kind, no wait, no wrong KV.

UCX is told to go over TCP, as between hosts: then nothing comes from a sender that stands still, so
that it can be ended in the middle, however small its KV is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import pytest

from coldframe.loader.errors import TransferBroken, TransferError
from coldframe.loader.transport.nixl import nixl_package
from tests.loader.memory_service.test_service import until
from tests.loader.transport.relay import Relay
from tests.loader.transport.side import BLOCK, SECRET, Side
from tests.support import unavailable

BLOCKS = 9
Open = Callable[..., Side]


class Reading(NamedTuple):
    """A receiver that waits for a sender which stands still.

    Args:
        sender: It has said where its blocks are, and can give nothing.
        receiver: It has begun to read.
    """

    sender: Side
    receiver: Side


@contextmanager
def reading(open_service: Open, *ways: str) -> Iterator[Reading]:
    """A request `b` that is in the middle of it."""
    sender, receiver = open_service(ways=ways), open_service(ways=ways)
    sender.write("a", BLOCKS)
    ticket = sender.offer("a", BLOCKS)
    (place,) = (way for way in ticket["ways"] if way["transport"] == "nixl")
    with Relay(place["address"]) as relay:
        place["address"] = relay.address
        receiver.start("b", ticket, BLOCKS)
        assert relay.held.wait(20)
        os.kill(sender.child.pid, signal.SIGSTOP)
        try:
            relay.pass_on()
            until(lambda: is_connected(receiver, sender))
            assert receiver.worker.is_on_its_way("b")
            yield Reading(sender, receiver)
        finally:
            if sender.child.poll() is None:
                os.kill(sender.child.pid, signal.SIGCONT)


def is_connected(one: Side, other: Side) -> bool:
    """Whether one's agent has called the other's: it reads, or is about to."""
    theirs = psutil.Process(other.child.pid).net_connections("tcp")
    ports = {found.laddr.port for found in theirs if found.status == psutil.CONN_LISTEN}
    mine = psutil.Process(one.child.pid).net_connections("tcp")
    return any(found.raddr and found.raddr.port in ports for found in mine)


@pytest.fixture(autouse=True)
def _by_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    if nixl_package() is None:
        unavailable("there is no NIXL: pip install 'coldframe[nixl]'")
    monkeypatch.setenv("UCX_TLS", "tcp")


def outcome(receiver: Side) -> TransferError:
    """Why the request's KV is lost."""

    def ask() -> bool:
        worker = receiver.worker
        if worker.is_on_its_way("b") or not worker.may_assign:
            return False
        assert worker.bring("b", 0, BLOCKS, BLOCKS, (), {}) is None
        return worker.lost_why is not None

    until(ask)
    error = receiver.worker.lost_why
    assert isinstance(error, TransferError)
    return error


class Given(NamedTuple):
    """Another sender's KV that has come to the receiver as it is.

    Args:
        blocks: Where.
        data: What is in them.
    """

    blocks: list[int]
    data: list[bytes]


def given(open_service: Open, receiver: Side) -> Given:
    """By a request `d`."""
    other = open_service(ways=("nixl",))
    data = other.write("c", BLOCKS)
    got = receiver.bring("d", other.offer("c", BLOCKS), BLOCKS)
    assert there(receiver, got.blocks) == data
    assert other.over() == ("c", True)
    return Given(list(got.blocks), data)


def there(side: Side, blocks: Sequence[int]) -> list[bytes]:
    return [bytes(side.view(block)) for block in blocks]


def test_a_sender_that_is_killed_in_the_middle_is_an_error(open_service: Open) -> None:
    with reading(open_service, "nixl") as (sender, receiver):
        assert receiver.used() == BLOCKS
        sender.child.kill()
        error = outcome(receiver)
        assert isinstance(error, TransferBroken)
        assert "sender is gone" in str(error) or "NIXL" in str(error)
        until(lambda: receiver.used() == 0)
        given(open_service, receiver)


def test_who_has_no_use_for_it_any_more_waits_for_no_sender(open_service: Open) -> None:
    """Nothing is written to its blocks behind that: they may be another request's."""
    with reading(open_service, "nixl") as (sender, receiver):
        receiver.worker.finish("b")
        until(lambda: receiver.used() == 0)
        blocks, data = given(open_service, receiver)
    # Nor does the sender wait for who read from it. It ends well, whatever is asked of it still.
    sender.owner.send({"type": "release", "request": "a"})
    assert sender.over() == ("a", False)
    until(lambda: sender.used() == 0)
    sender.close()
    assert sender.child.wait() == 0
    assert there(receiver, blocks) == data


# A receiver with little patience, which says when it has been lent what it asks for.
_IMPATIENT = """
import sys
from coldframe.loader.devices.cpu import CpuDevice
from coldframe.loader.errors import TransferBroken
from coldframe.loader.transport.handshake import dial
from coldframe.loader.transport.nixl import NixlAgent

address, secret, token, size = sys.argv[1:]
device = CpuDevice()
arena = device.arena("kv", int(size), now=True)
agent = NixlAgent(lambda: arena, lambda: device, patience_s=0.2)
agent.offer()
client = dial(address, secret.encode(), "kv", timeout_s=20)
client.send({"do": "lend", "token": token})
told = client.recv()
print("lent", flush=True)
sys.stdin.readline()
try:
    agent.read(told, [(0, told["blocks"][0] * int(size), int(size))], lambda: True)
except TransferBroken as error:
    print(error, flush=True)
agent.close()
arena.close()
try:
    agent.offer()
except TransferBroken as error:
    print(error, flush=True)
"""


def test_a_sender_that_stands_still_is_not_waited_for_for_ever(open_service: Open) -> None:
    sender = open_service(ways=("nixl",))
    sender.write("a", BLOCKS)
    ticket = sender.offer("a", BLOCKS)
    (way,) = ticket["ways"]
    words = [way["address"], SECRET, ticket["token"], str(BLOCK)]
    with subprocess.Popen(
        [sys.executable, "-c", _IMPATIENT, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "lent\n"
        os.kill(sender.child.pid, signal.SIGSTOP)
        try:
            said, _ = receiver.communicate("go\n", timeout=60)
        finally:
            os.kill(sender.child.pid, signal.SIGCONT)
            receiver.kill()
    broken, ended = said.splitlines()
    assert "takes too long" in broken
    assert "ending" in ended
    assert receiver.returncode == 0
