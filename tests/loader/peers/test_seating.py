"""What a node answers those who want to read from it, over a real connection."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldframe.loader.errors import (
    SourceBusy,
    SourceChanged,
    SourceCredentials,
    SourceError,
    SourceNotFound,
    SourceProtocol,
    SourceUnreachable,
)
from coldframe.loader.peers.http import DONE_HEADER, READERS, SERVES_HEADER
from coldframe.loader.peers.listener import listen
from coldframe.loader.peers.node import CHOOSING, LOADED, LOADING, Node, Root, hashed
from coldframe.loader.peers.server import PeerServer
from coldframe.loader.sources.location import Peer
from coldframe.loader.web.peer_talk import Elsewhere, PeerTalk, Seat
from tests.loader.peers.peer import TOKEN, Serving, serving
from tests.loader.weights import layered
from tests.support import no_threads_left

A, B, C = ("a" * 32, "b" * 32, "c" * 32)
TALK = PeerTalk(TOKEN)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered(tmp_path_factory.mktemp("seats") / "m", nbytes=2000)


@pytest.fixture
def peer(model: Path) -> Iterator[Serving]:
    with serving(model, node=Node(str(model))) as made:
        yield made


def at(serving: Serving) -> Peer:
    return Peer(serving.host, serving.port)


def put(peer: Serving, target: str, method: str = "PUT", **headers: str) -> tuple[int, bytes]:
    """By the standard library's client."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(peer.host, peer.port, timeout=20)
    try:
        connection.request(method, target, headers={"Authorization": f"Bearer {TOKEN}", **named})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_what_it_says_of_itself(peer: Serving, model: Path) -> None:
    assert peer.node is not None
    peer.node.comes_from(Root(hashed("place"), hashed("versions")))
    facts = TALK.node(at(peer))
    assert facts.node == peer.node.id
    assert facts.model == hashed(str(model))
    assert facts.fingerprint == peer.checkpoint.fingerprint
    assert facts.root == Root(hashed("place"), hashed("versions"))
    assert (facts.state, facts.whole, facts.seated) == (LOADED, True, False)
    assert (facts.done, facts.readers) == (peer.plan.weights_bytes, 0)


def test_a_seat_is_taken_kept_and_left(peer: Serving) -> None:
    assert peer.node is not None
    wanted = peer.checkpoint.fingerprint
    for _ in range(2):
        seat = TALK.seat(at(peer), A, fingerprint=wanted, serves=":7")
        assert isinstance(seat, Seat)
        assert seat.via == (peer.node.id,)
    assert TALK.seat(at(peer), B, serves=":8") == Elsewhere(Peer("127.0.0.1", 7), A)
    TALK.leave(at(peer), A)
    assert TALK.node(at(peer)).readers == 0
    assert isinstance(TALK.seat(at(peer), B, serves="10.0.0.8:8"), Seat)
    assert TALK.seat(at(peer), C) == Elsewhere(Peer("10.0.0.8", 8), B)
    assert isinstance(TALK.seat(at(peer), C, avoid=[B]), Seat)


def test_the_redirect_is_http(peer: Serving) -> None:
    put(peer, READERS + A, **{SERVES_HEADER: "[fd00::1]:9400"})
    connection = http.client.HTTPConnection(peer.host, peer.port, timeout=20)
    connection.request("PUT", READERS + B, headers={"Authorization": f"Bearer {TOKEN}"})
    response = connection.getresponse()
    assert response.status == 307
    assert response.getheader("Location") == f"http://[fd00::1]:9400{READERS}{B}"
    assert json.loads(response.read()) == {"ask": "[fd00::1]:9400", "node": A}
    connection.close()


def test_the_node_itself_and_whom_it_reads_from(peer: Serving) -> None:
    assert peer.node is not None
    with pytest.raises(SourceError, match="this is the node itself"):
        TALK.seat(at(peer), peer.node.id)
    peer.node.reads_from((A, B))
    assert isinstance(TALK.seat(at(peer), A), Seat)  # it has all of it


def test_a_circle_is_refused(model: Path) -> None:
    with serving(model, loaded=False, node=Node("m")) as peer:
        assert peer.node is not None
        peer.node.reads_from((A, B))
        for node in (A, B):
            with pytest.raises(SourceError, match="takes its weights from that one"):
                TALK.seat(at(peer), node)
        seat = TALK.seat(at(peer), C)
        assert isinstance(seat, Seat)
        assert seat.via == (A, B, peer.node.id)
        assert seat.facts.state == LOADING


def test_who_has_as_much_already(model: Path) -> None:
    with serving(model, loaded=False, node=Node("m")) as peer:
        peer.bring(0)
        done = peer.plan.stages[0].nbytes
        with pytest.raises(SourceError, match="no more of it"):
            TALK.seat(at(peer), A, done=done)
        assert isinstance(TALK.seat(at(peer), A, done=done - 1), Seat)
        peer.bring(*range(1, len(peer.plan.stages)))
        peer.finish()
        assert isinstance(TALK.seat(at(peer), A, done=10 * done), Seat)


def test_who_has_found_no_source_yet_and_who_failed(model: Path) -> None:
    node = Node("m")
    with no_threads_left():
        server = PeerServer(listen("127.0.0.1", 0), TOKEN, node=node)
        where = Peer(*server.address)
        assert TALK.node(where).state == CHOOSING
        with pytest.raises(SourceBusy):
            TALK.seat(where, A)
        node.ended(failed=True)
        with pytest.raises(SourceError, match="could not load the model itself"):
            TALK.seat(where, A)
        server.close()


def test_a_slice_and_another_model(peer: Serving) -> None:
    with pytest.raises(SourceChanged, match="another model"):
        TALK.seat(at(peer), A, fingerprint="0" * 64)
    assert peer.node is not None
    peer.node.whole = False
    with pytest.raises(SourceError, match="only a slice"):
        TALK.seat(at(peer), A)


def test_who_tells_nothing_of_itself_and_nobody(model: Path) -> None:
    with serving(model) as plain, pytest.raises(SourceNotFound):
        TALK.node(at(plain))
    with listen("127.0.0.1", 0) as free:
        nobody = Peer(*free.getsockname())
    with pytest.raises(SourceUnreachable):
        TALK.node(nobody)


def test_a_wrong_token(peer: Serving) -> None:
    with pytest.raises(SourceCredentials) as caught:
        PeerTalk("wrong").node(at(peer))
    assert "COLDFRAME_PEER_TOKEN" in caught.value.hint


@pytest.mark.parametrize("said", [1, {}, {"version": 2}, {"version": 1, "node": "me"}])
def test_what_says_nothing_of_the_kind(
    peer: Serving, monkeypatch: pytest.MonkeyPatch, said: object
) -> None:
    monkeypatch.setattr(Node, "to_wire", lambda self: said)
    with pytest.raises(SourceProtocol):
        TALK.node(at(peer))


def test_requests_that_make_no_sense(peer: Serving) -> None:
    assert put(peer, f"{READERS}nobody")[0] == 400
    assert put(peer, READERS + A, "POST")[0] == 405
    assert put(peer, "/v1/node")[0] == 405
    assert put(peer, READERS + A, **{SERVES_HEADER: "host:0"})[0] == 400
    assert put(peer, READERS + A, **{SERVES_HEADER: "a b:1"})[0] == 400
    assert put(peer, READERS + A, X_Coldframe_Avoid="x")[0] == 400
    assert peer.node is not None
    assert peer.node.seats.taken == 0


def test_bytes_that_are_no_number(model: Path) -> None:
    with serving(model, loaded=False, node=Node("m")) as peer:
        assert put(peer, READERS + A, **{DONE_HEADER: "-1"})[0] == 400


def test_without_a_token_nobody_gets_a_seat(peer: Serving) -> None:
    connection = http.client.HTTPConnection(peer.host, peer.port, timeout=20)
    connection.request("PUT", READERS + os.urandom(16).hex())
    assert connection.getresponse().status == 401
    connection.close()
