from __future__ import annotations

import http.client
import json
from pathlib import Path

import pytest

from coldframe.loader.errors import (
    CheckpointError,
    ColdframeError,
    SourceChanged,
    SourceCorrupt,
    SourceCredentials,
    SourceError,
    SourceNotFound,
    SourceUnreachable,
)
from coldframe.loader.peers.server import ServerLimits
from coldframe.loader.sources.location import Peer
from coldframe.loader.web.address import Again, Refusal, Target
from coldframe.loader.web.peer import PLAN_FILE, PeerAddress
from tests.loader.peers.peer import TOKEN, Serving, serving
from tests.loader.weights import layered

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered(tmp_path_factory.mktemp("peers") / "m")


def address_of(peer: Serving, token: str | None = TOKEN, **options: str) -> PeerAddress:
    return PeerAddress(Peer(peer.host, peer.port), token, **options)


def ask(address: PeerAddress, name: str, **headers: str) -> bytes | Again:
    """One request by the standard library's client; what the address makes of a refusal."""
    target = address.target(name, {key.replace("_", "-"): value for key, value in headers.items()})
    connection = http.client.HTTPConnection(target.host, target.port, timeout=20)
    try:
        connection.request("GET", target.path, headers=dict(target.headers))
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status < 300:
        return body
    named = {key.lower(): value for key, value in response.getheaders()}
    refusal = Refusal(response.status, response.reason, named, body, target, address.uri_of(name))
    return address.refused(refusal)


def test_files_are_found_by_their_names(model: Path) -> None:
    with serving(model) as peer:
        address = address_of(peer)
        assert ask(address, "config.json") == (model / "config.json").read_bytes()
        assert ask(address, SHARD, Range="bytes=5-9") == (model / SHARD).read_bytes()[5:10]
        found = ask(address, PLAN_FILE)
        assert isinstance(found, bytes)
        assert json.loads(found)["plan"] == peer.plan.hash


def test_what_people_see_of_it() -> None:
    address = PeerAddress(Peer("::1", 9000), TOKEN)
    assert address.uri == "peer://[::1]:9000"
    assert address.uri_of(SHARD) == f"peer://[::1]:9000/{SHARD}"
    assert TOKEN not in repr(address.target("config.json", {}))


def test_names_cannot_lead_elsewhere() -> None:
    address = PeerAddress(Peer("127.0.0.1", 9000))
    assert address.target("../plan?x#y z", {}).path == "/v1/files/..%2Fplan%3Fx%23y%20z"


def test_the_token_comes_from_the_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model) as peer:
        monkeypatch.setenv("COLDFRAME_PEER_TOKEN", TOKEN)
        assert isinstance(ask(address_of(peer, None), "config.json"), bytes)
        for given, what in [
            ("", "the peer wants a token"),
            ("x", "the peer does not take our token"),
        ]:
            monkeypatch.setenv("COLDFRAME_PEER_TOKEN", given)
            with pytest.raises(SourceCredentials) as caught:
                ask(address_of(peer, None), "config.json")
            assert caught.value.what == what
            assert caught.value.where == f"peer://{peer.host}:{peer.port}/config.json"
            assert "COLDFRAME_PEER_TOKEN" in caught.value.hint
        monkeypatch.setenv("COLDFRAME_PEER_TOKEN", "two words")
        with pytest.raises(SourceCredentials) as caught:
            address_of(peer, None)
        assert "two words" not in str(caught.value)


def test_what_is_not_there(model: Path) -> None:
    with serving(model) as peer:
        for name in ["absent.json", "absent.safetensors"]:
            with pytest.raises(SourceNotFound):
                ask(address_of(peer), name)


def test_another_plan_and_another_checkpoint_are_refused(model: Path) -> None:
    with serving(model) as peer:
        same = address_of(peer, plan_hash=peer.plan.hash)
        same.expect(peer.checkpoint.fingerprint)
        assert isinstance(ask(same, SHARD, Range="bytes=0-7"), bytes)
        other = address_of(peer, plan_hash="1" * 64)
        with pytest.raises(SourceChanged) as caught:
            ask(other, SHARD, Range="bytes=0-7")
        assert caught.value.what == "the peer serves another model, or another version of it"
        assert (caught.value.expected, caught.value.got) == ("1" * 64, peer.plan.hash)
        same.expect("2" * 64)
        with pytest.raises(SourceChanged) as caught:
            ask(same, "config.json")
        assert (caught.value.expected, caught.value.got) == ("2" * 64, peer.checkpoint.fingerprint)


def test_a_peer_that_has_not_got_it_yet_is_asked_again(model: Path) -> None:
    limits = ServerLimits(patience_s=0.05)
    with serving(model, loaded=False, limits=limits) as peer:
        again = ask(address_of(peer), SHARD)
        assert isinstance(again, Again)
        # It is no faster when fewer ask.
        assert (again.after_s, again.slow_down) == (1.0, False)
        assert "still loading" in again.why


def test_a_peer_with_too_many_connections_is_asked_less(model: Path) -> None:
    with serving(model, limits=ServerLimits(connections=0)) as peer:
        again = ask(address_of(peer), SHARD)
        assert isinstance(again, Again)
        assert (again.after_s, again.slow_down) == (1.0, True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SourceChanged("a file was modified", where="/secret/place", got="x"), SourceChanged),
        (SourceCorrupt("a piece is bad", expected="a", got="b"), SourceCorrupt),
        (SourceUnreachable("timed out"), SourceUnreachable),
        (CheckpointError("no weights"), SourceUnreachable),
    ],
)
def test_a_peer_that_failed_is_not_asked_again(
    model: Path, error: ColdframeError, kind: type[SourceError]
) -> None:
    with serving(model, loaded=False) as peer:
        peer.server.fail(error)
        with pytest.raises(SourceError) as caught:
            ask(address_of(peer), SHARD)
        assert type(caught.value) is kind
        assert caught.value.what == f"the peer could not load the model itself: {error.what}"
        assert (caught.value.expected, caught.value.got) == (error.expected, error.got)
        assert caught.value.where == f"peer://{peer.host}:{peer.port}/{SHARD}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"state": 3, "what": []}',
        b"[" * 60000,
        b"\xff",
        b'{"what": "\\u0007"}',
    ],
)
@pytest.mark.parametrize("status", [401, 404, 409, 412, 416, 403, 503, 500, 302])
def test_whoever_answers_may_be_no_peer(status: int, body: bytes) -> None:
    address = PeerAddress(Peer("127.0.0.1", 9000))
    target = Target("http", "127.0.0.1", 9000, "/v1/plan", {})
    refusal = Refusal(status, "No", {}, body, target, "peer://127.0.0.1:9000/x, bytes 0-7")
    if status in (500, 503):
        assert str(status) in address.refused(refusal).why
        return
    with pytest.raises(SourceError) as caught:
        address.refused(refusal)
    assert caught.value.where == "peer://127.0.0.1:9000/x, bytes 0-7"
