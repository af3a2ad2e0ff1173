"""Two memory services: what a worker of the first has written, one of the second has taken."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import (
    ColdframeError,
    PlatformError,
    TransferBroken,
    TransferDenied,
    TransferRefused,
)
from coldframe.loader.transport.base import new_token
from coldframe.loader.transport.handshake import dial
from coldframe.loader.transport.nixl import nixl_package
from coldframe.loader.transport.secure import SecureSocket
from tests.loader.memory_service.test_service import Service, failed, until
from tests.loader.transport.side import BLOCK, SECRET, Side
from tests.support import unavailable

Open = Callable[..., Side]


@pytest.mark.parametrize(
    ("way", "keyed"),
    [("shared", False), ("tcp", False), ("tcp", True), ("nixl", False)],
    indirect=["way"],
)
def test_blocks_come_over_as_they_are(way: str, keyed: bool, open_service: Open) -> None:
    sender, receiver = open_service(ways=(way,)), open_service(ways=(way,), keyed=keyed)
    receiver.open("before")
    first, second = receiver.assign("before", 2), None
    for number in range(2):  # the second over what the first has left open
        data = sender.write(f"a{number}", 9, room=2)
        ticket = sender.offer(f"a{number}", 9)
        assert [found["transport"] for found in ticket["ways"]] == [way]
        got = receiver.bring(f"b{number}", ticket, 9, count=11)
        assert len(got.blocks) == 11
        assert not set(got.blocks) & set(first.blocks)
        assert [bytes(receiver.view(block)) for block in got.blocks[:9]] == data
        assert sender.over() == (f"a{number}", True)
        until(lambda: sender.used() == 0)
        second = got
    assert second is not None
    assert receiver.used() == 24


def test_the_cheapest_way_that_can_be_gone_is(open_service: Open) -> None:
    sender, receiver = open_service(), open_service()
    sender.write("a", 3)
    ticket = sender.offer("a", 3)
    assert [way["transport"] for way in ticket["ways"]] == ["shared", "tcp"]
    for way in ticket["ways"]:
        if way["transport"] == "tcp":
            way["address"] = "127.0.0.1:1"  # nobody is there: it has to be the other one
    receiver.bring("b", ticket, 3)
    assert sender.over() == ("a", True)
    # Who cannot go the first takes the second: another machine, or one that has restarted since.
    sender.write("c", 3)
    ticket = sender.offer("c", 3)
    ticket["ways"][0]["host"] = "another"
    receiver.bring("d", ticket, 3)
    assert sender.over() == ("c", True)


def test_where_nixl_reaches_nobody_tcp_does(
    open_service: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    if nixl_package() is None:
        unavailable("there is no NIXL: pip install 'coldframe[nixl]'")
    ways = ("nixl", "tcp")
    receiver = open_service(ways=ways)
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_NET_DEVICES", "none-such")
    sender = open_service(ways=ways)
    data = sender.write("a", 3)
    ticket = sender.offer("a", 3)
    assert [way["transport"] for way in ticket["ways"]] == ["nixl", "tcp"]
    got = receiver.bring("b", ticket, 3)
    assert [bytes(receiver.view(block)) for block in got.blocks] == data
    assert sender.over() == ("a", True)
    # By NIXL alone it is lost, and an error says so.
    sender.write("c", 3)
    ticket = sender.offer("c", 3)
    ticket["ways"] = ticket["ways"][:1]
    with pytest.raises(ColdframeError, match="NIXL"):
        receiver.bring("d", ticket, 3)


@pytest.mark.parametrize(("way", "count"), [("tcp", 36), ("nixl", 70)], indirect=["way"])
def test_what_is_large_comes_in_several_parts(way: str, count: int, open_service: Open) -> None:
    """Over several connections, or in portions."""
    size, room = 1 << 20, count + 4
    sender = open_service(ways=(way,), blocks=room, block_bytes=size)
    receiver = open_service(ways=(way,), blocks=room, block_bytes=size)
    sender.open("a")
    got = sender.assign("a", count)
    assert sender.worker.kv is not None
    assert receiver.worker.kv is not None
    whole = sender.worker.kv.reservation.view()
    for place, block in enumerate(got.blocks):
        whole[block * size : (block + 1) * size] = bytes([place + 1]) * size
    sender.worker.publish("a", [])
    sender.worker.drop("a")
    there = receiver.bring("b", sender.offer("a", count), count)
    whole = receiver.worker.kv.reservation.view()
    for place, block in enumerate(there.blocks):
        assert bytes(whole[block * size : (block + 1) * size]) == bytes([place + 1]) * size


def test_a_ticket_is_good_once(way: str, open_service: Open) -> None:
    sender, receiver = open_service(ways=(way,)), open_service(ways=(way,))
    sender.write("a", 3)
    ticket = sender.offer("a", 3)
    receiver.bring("b", ticket, 3)
    assert sender.over() == ("a", True)
    with pytest.raises(TransferRefused, match="no such KV"):
        receiver.bring("c", ticket, 3)
    with pytest.raises(TransferRefused, match="no such KV"):
        receiver.bring("d", {**ticket, "token": new_token()}, 3)
    until(lambda: receiver.used() == 3)  # those of the one that came


def test_time_runs_out(way: str, open_service: Open) -> None:
    sender, receiver = open_service(ways=(way,)), open_service(ways=(way,))
    sender.write("a", 3)
    ticket = sender.offer("a", 3, ttl_s=0.1)
    assert sender.used() == 3
    assert sender.over() == ("a", False)
    until(lambda: sender.used() == 0)
    with pytest.raises(TransferRefused):
        receiver.bring("b", ticket, 3)


def test_a_request_that_has_ended_is_not_to_be_taken(open_service: Open) -> None:
    sender, receiver = open_service(), open_service()
    sender.write("a", 3)
    ticket = sender.offer("a", 3)
    sender.owner.send({"type": "release", "request": "a"})
    assert sender.over() == ("a", False)
    with pytest.raises(TransferRefused):
        receiver.bring("b", ticket, 3)
    until(lambda: sender.used() == 0)


def test_whoever_offered_it_dies_and_another_may_claim_it(open_service: Open) -> None:
    sender = open_service()
    data = sender.write("a", 3)
    passes_on = sender.connect()
    told = {"kv_tokens": 96, "fingerprint": "f", "kv_format": "k", "ttl_s": 30.0}
    passes_on.send({"type": "offer", "request": "a", "attempt": 0, "written": 3, **told})
    message = passes_on.recv(20)
    assert message is not None
    assert message.body["ticket"] is not None
    assert sender.worker.claim("a", 1) is None  # it is kept for who has the ticket
    passes_on.close()
    found: list[int] = []
    until(lambda: found.extend(sender.worker.claim("a", 1) or ()) or found)
    assert [bytes(sender.view(block)) for block in found] == data


def test_kv_that_nobody_has_written_is_not_offered(open_service: Open) -> None:
    sender = open_service()
    sender.open("a")
    sender.assign("a", 3)
    assert sender.offer("a", 3) is None  # a worker has it
    assert sender.offer("b", 3) is None  # nobody knows of it
    sender.write("c", 2)
    assert sender.offer("c", 3) is None  # it has fewer


@pytest.mark.parametrize(
    "change",
    [
        {"block_bytes": BLOCK + 1},
        {"blocks": 2},
        {"version": 7},
        {"token": "x"},
        {"ways": []},
        {"ways": [{"transport": "pigeon", "address": "x"}]},
        {"ways": [{"transport": "tcp", "address": "nowhere"}]},
    ],
)
def test_a_ticket_that_does_not_fit_here_is_refused(
    change: dict[str, Any], open_service: Open
) -> None:
    sender, receiver = open_service(), open_service()
    sender.write("a", 3)
    with pytest.raises(TransferRefused):
        receiver.bring("b", {**sender.offer("a", 3), **change}, 3)
    assert receiver.used() == 0


def test_a_dead_sender_is_an_error_and_no_wait(way: str, open_service: Open) -> None:
    sender, receiver = open_service(ways=(way,)), open_service(ways=(way,))
    sender.write("a", 3)
    ticket = sender.offer("a", 3)
    sender.child.kill()
    with pytest.raises((TransferBroken, TransferRefused)):
        receiver.bring("b", ticket, 3)
    until(lambda: receiver.used() == 0)


class Slow:
    """A sender that begins to give, and stays there."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.giving = threading.Event()
        self.gone = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _serve(self) -> None:
        from coldframe.loader.transport.handshake import welcome

        sock, _ = self._listener.accept()
        with sock:
            client = welcome(sock, SECRET.encode(), "kv")
            sock.settimeout(20)
            assert client.recv() is not None
            client.send({"nbytes": 3 * BLOCK})
            sock.sendall(b"x" * 1000)
            self.giving.set()
            while sock.recv(4096):
                pass
            self.gone.set()

    def close(self) -> None:
        self._listener.close()
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_who_has_no_use_for_it_any_more_breaks_it_off(open_service: Open) -> None:
    sender, receiver = open_service(ways=("tcp",)), open_service(ways=("tcp",))
    sender.write("a", 3)
    slow = Slow()
    try:
        ticket = sender.offer("a", 3)
        ticket["ways"][0]["address"] = slow.address
        receiver.start("b", ticket, 3)
        assert slow.giving.wait(20)
        assert receiver.used() == 3
        receiver.worker.finish("b")
        assert slow.gone.wait(20)
        until(lambda: receiver.used() == 0)
    finally:
        slow.close()


def test_a_worker_that_dies_leaves_nothing(open_service: Open) -> None:
    sender, receiver = open_service(ways=("tcp",)), open_service(ways=("tcp",), lease_s=0.1)
    sender.write("a", 3)
    slow = Slow()
    try:
        ticket = sender.offer("a", 3)
        ticket["ways"][0]["address"] = slow.address
        other = receiver.client("other")
        other.wait_arenas()
        receiver.start("b", ticket, 3, by=other)
        assert slow.giving.wait(20)
        other.hang_up()
        assert slow.gone.wait(20)
        until(lambda: receiver.used() == 0)
    finally:
        slow.close()


def test_a_sender_that_takes_it_back_stops_giving(open_service: Open) -> None:
    """A client that asks for blocks and does not read them holds them no longer than that."""
    sender = open_service(ways=("tcp",), blocks=64, block_bytes=1 << 20)
    sender.open("a")
    sender.assign("a", 60)
    sender.worker.publish("a", [])
    sender.worker.drop("a")
    ticket = sender.offer("a", 60)
    thief = dial(sender.address, SECRET.encode(), "kv", timeout_s=20)
    try:
        thief.send({"do": "blocks", "token": ticket["token"], "runs": [[0, 60]], "keyed": False})
        assert thief.recv() == {"nbytes": 60 << 20}
        sender.owner.send({"type": "release", "request": "a"})
        assert sender.over() == ("a", False)
        until(lambda: sender.used() == 0)
    finally:
        thief.close()


@pytest.mark.parametrize(
    "runs",
    [
        [[0, 4]],
        [[0, 3], [0, 1]],
        [[-1, 2]],
        [[0, 0]],
        [[3, 1]],
        "all",
        [[0]],
        [[0, "1"]],
        [[0, True]],
    ],
)
def test_nothing_but_the_offer_is_given(runs: Any, open_service: Open) -> None:
    sender = open_service(ways=("tcp",))
    sender.write("a", 3)
    client = dial(sender.address, SECRET.encode(), "kv", timeout_s=20)
    try:
        asked = {"do": "blocks", "token": sender.offer("a", 3)["token"], "runs": runs}
        client.send(asked)
        answer = client.recv()
        assert answer is not None
        error = ColdframeError.from_wire(answer["error"])
        assert isinstance(error, TransferRefused)
        assert "not in the offer" in str(error)
    finally:
        client.close()


@pytest.mark.parametrize("body", [{}, {"do": "blocks"}, {"do": "all", "token": "x"}])
def test_who_talks_nonsense_is_hung_up_on(body: dict[str, Any], open_service: Open) -> None:
    sender = open_service(ways=("tcp",))
    client = dial(sender.address, SECRET.encode(), "kv", timeout_s=20)
    try:
        client.send(body)
        assert _ended(client)
    finally:
        client.close()


def _ended(client: SecureSocket) -> bool:
    try:
        return client.recv() is None
    except TransferBroken:
        return True


def test_who_does_not_know_the_secret_gets_nothing(
    open_service: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender = open_service(ways=("tcp",))
    sender.write("a", 3)
    ticket = sender.offer("a", 3)
    with pytest.raises(TransferDenied):
        dial(sender.address, b"some other secret of theirs", "kv", timeout_s=20)
    monkeypatch.setenv("COLDFRAME_KV_SECRET", "some other secret of theirs")
    receiver = open_service(ways=("tcp",))
    with pytest.raises(TransferDenied):
        receiver.bring("b", ticket, 3)
    monkeypatch.delenv("COLDFRAME_KV_SECRET")
    another = open_service(ways=("tcp",), listen=None)
    with pytest.raises(TransferRefused, match="no secret"):
        another.bring("b", ticket, 3)
    assert sender.used() == 3


def test_nobody_listens_without_a_secret(
    model: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLDFRAME_KV_SECRET", raising=False)
    monkeypatch.delenv("COLDFRAME_KV_SECRET_FILE", raising=False)
    service = Service(base)
    try:
        how = {"advertise": None, "transports": ["tcp"], "keyed": False}
        service.load(model)
        service.owner.send({"type": "transfer", "listen": "127.0.0.1:0", **how})
        error = failed(service)
        assert isinstance(error, PlatformError)
        assert "secret" in str(error)
    finally:
        service.close()
        service.child.kill()


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


def test_nothing_is_left_open(open_service: Open) -> None:
    """Descriptors of a service that gives and takes stay as many as they are."""
    sender, receiver = open_service(), open_service()

    def count() -> int:
        return len(os.listdir(f"/proc/{receiver.child.pid}/fd")) + len(
            os.listdir(f"/proc/{sender.child.pid}/fd")
        )

    def once(number: int) -> None:
        sender.write(f"a{number}", 2)
        receiver.bring(f"b{number}", sender.offer(f"a{number}", 2), 2)
        assert sender.over()[1]
        receiver.worker.finish(f"b{number}")
        for side, request in ((sender, f"a{number}"), (receiver, f"b{number}")):
            side.owner.send({"type": "release", "request": request})

    once(0)
    until(lambda: sender.used() == receiver.used() == 0)
    before = count()
    for number in range(1, 6):
        once(number)
    deadline = time.monotonic() + 20
    while count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
