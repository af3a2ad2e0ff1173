from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from coldframe.loader.errors import RequestError, SourceError, SourceNotFound, SourceUnreachable
from coldframe.loader.peers.directory import (
    AwaitedPeers,
    JointPeers,
    ListedPeers,
    NamedPeers,
    check_peers,
    open_directory,
)
from coldframe.loader.sources.location import Peer


def test_a_list() -> None:
    found = open_directory(["10.0.0.1:9400", "peer://[::1]:7", "node-2:1"], [])
    assert list(found.peers()) == [Peer("10.0.0.1", 9400), Peer("::1", 7), Peer("node-2", 1)]


def test_all_addresses_of_a_name() -> None:
    found = open_directory([], ["dns://localhost:9400"]).peers()
    assert Peer("127.0.0.1", 9400) in found or Peer("::1", 9400) in found
    assert len(set(found)) == len(found)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises((SourceNotFound, SourceUnreachable)) as caught:
        NamedPeers("peers.invalid", 9400).peers()
    assert caught.value.where == "dns://peers.invalid"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (socket.EAI_NONAME, SourceNotFound),
        (socket.EAI_NODATA, SourceNotFound),
        (socket.EAI_AGAIN, SourceUnreachable),
        (socket.EAI_FAIL, SourceUnreachable),
    ],
)
def test_that_nobody_is_there_is_not_that_nobody_answers(
    code: int, kind: type[SourceError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "as the resolver says")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(kind):
        NamedPeers("peers", 9400).peers()


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "some peers"
    found = open_directory([], [f"file://{path}".replace(" ", "%20")])
    assert list(found.peers()) == []
    path.write_text("# who is there\n10.0.0.1:1\n\n10.0.0.2:2  # the second\n10.0.0.1:1\n")
    assert list(found.peers()) == [Peer("10.0.0.1", 1), Peer("10.0.0.2", 2)]
    path.write_text("10.0.0.1:1\nnonsense  # of somebody\n")
    with pytest.raises(SourceError) as caught:
        found.peers()
    assert caught.value.where == str(path)
    assert caught.value.got == "'nonsense'"


def test_a_file_that_is_about_to_be_written_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "the peers"
    found = open_directory([], [f"awaited://60{path}".replace(" ", "%20")])
    assert 59 < found.waits_s <= 60

    def write() -> None:
        beside = tmp_path / "beside"
        beside.write_text("10.0.0.1:1\n")
        beside.rename(path)

    writer = threading.Timer(0.1, write)
    writer.start()
    assert list(found.peers()) == [Peer("10.0.0.1", 1)]
    writer.join()
    path.write_text("10.0.0.2:2\n")
    assert list(found.peers()) == [Peer("10.0.0.2", 2)]


def test_who_waits_for_a_file_does_so_for_a_while(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    found = AwaitedPeers(str(path), 0.05)
    with pytest.raises(SourceUnreachable) as caught:
        found.peers()
    assert caught.value.where == str(path)
    path.write_text("10.0.0.1:1\n")  # it has come late, and is there for the next who asks
    assert list(found.peers()) == [Peer("10.0.0.1", 1)]
    assert JointPeers([ListedPeers(str(path)), found]).waits_s <= 0.05


def test_several_are_one(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    path.write_text("10.0.0.2:2\n10.0.0.1:1\n")
    places = [f"file://{path}", "dns://peers.invalid:1"]
    found = open_directory(["10.0.0.1:1"], places)
    assert list(found.peers()) == [Peer("10.0.0.1", 1), Peer("10.0.0.2", 2)]
    with pytest.raises((SourceNotFound, SourceUnreachable)):
        JointPeers([ListedPeers(str(tmp_path / "none")), NamedPeers("peers.invalid", 1)]).peers()


@pytest.mark.parametrize(
    ("peers", "places"),
    [
        (["10.0.0.1"], []),
        (["http://10.0.0.1:1"], []),
        ([], ["dns://name"]),
        ([], ["dns://:1"]),
        ([], ["dns://name:99999"]),
        ([], ["file://relative"]),
        ([], ["file:///run/a%00b"]),
        ([], ["awaited://60"]),
        ([], ["awaited:///run/peers"]),
        ([], ["awaited://soon/run/peers"]),
        ([], ["awaited://-1/run/peers"]),
        ([], ["awaited://nan/run/peers"]),
        ([], ["awaited://60/run/"]),
        ([], ["awaited://60/%00"]),
        ([], ["consul://x:1"]),
        ([], ["name:1"]),
    ],
)
def test_what_is_none(peers: list[str], places: list[str]) -> None:
    with pytest.raises(RequestError):
        check_peers(peers, places)
