"""What the flags of replicas that feed one another stand for."""

from __future__ import annotations

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.peers import add_peer_arguments, peer_options


def options(*flags: str) -> dict[str, object]:
    parser = Parser(prog="coldframe test")
    add_peer_arguments(parser)
    return peer_options(parser.parse(flags))


def test_nobody_feeds_anybody_by_itself() -> None:
    assert options() == {"serve_peers": None, "peers": (), "peers_from": (), "peer_readers": 1}


def test_a_list_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--peers", "10.0.0.1:9400, [::1]:9400,", "--peer-readers", "2")
    places = ("--peers-from", "dns://peers:9400", "--peers-from", "file:///run/peers")
    expected = {
        "serve_peers": "0.0.0.0:9400",
        "peers": ("10.0.0.1:9400", "[::1]:9400"),
        "peers_from": ("dns://peers:9400", "file:///run/peers"),
        "peer_readers": 2,
    }
    assert options(*given, *places, "--serve-peers", "0.0.0.0:9400") == expected
    monkeypatch.setenv("COLDFRAME_PEERS", "10.0.0.1:9400")
    monkeypatch.setenv("COLDFRAME_PEERS_FROM", "dns://peers:9400")
    found = options()
    assert (found["peers"], found["peers_from"]) == (("10.0.0.1:9400",), ("dns://peers:9400",))


@pytest.mark.parametrize(
    "flags",
    [
        ("--peers", "10.0.0.1"),
        ("--peers-from", "etcd://x"),
        ("--peers-from", "dynamo"),
        ("--peers-from", "dynamo:10"),
        ("--peer-readers", "0"),
    ],
)
def test_what_cannot_be_meant(flags: tuple[str, ...]) -> None:
    with pytest.raises(RequestError):
        options(*flags)
