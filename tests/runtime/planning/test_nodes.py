"""Nodes: what may be written of them, what they say, and how they are ranked."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.errors import RequestError
from coldframe.runtime.planning import node_answers
from coldframe.runtime.planning.footprint import Footprint
from coldframe.runtime.planning.law import Worker
from coldframe.runtime.planning.node_answers import ask_nodes, facts_of
from coldframe.runtime.planning.nodes import PLACES, STATES, Node, NodeFacts, read_nodes
from coldframe.runtime.planning.placement import Here, of_node, ranked
from coldframe.runtime.planning.rates import Cell, Rates
from tests.loader.peers.peer import TOKEN, serving

Make = Callable[..., Path]


def test_how_a_node_is_written() -> None:
    written = ["box", "box:80", "https://box/x/", "peer://box:9400", "http://[::1]:8000"]
    urls = [node.url for node in read_nodes(written, None)]
    assert urls == [
        "http://box:8000",
        "http://box:80",
        "https://box/x",
        "peer://box:9400",
        "http://[::1]:8000",
    ]


@pytest.mark.parametrize("text", ["", "ftp://box", "box:port", "http://", "http://[::1"])
def test_what_is_no_node(text: str) -> None:
    with pytest.raises(RequestError, match="no node"):
        read_nodes([text], None)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "[1]",
        "[{}]",
        '[{"name": 1}]',
        '[{"name": "a"}]',
        '[{"name": "a", "colour": "red"}]',
        '[{"name": "a", "memory_free": "much"}]',
        '[{"name": "a", "memory_free": -1}]',
        '[{"name": "a", "memory_free": true}]',
        '[{"name": "a", "rate": "fast"}]',
        '[{"name": "a", "rate": 0}]',
        '[{"name": "a", "rate": NaN}]',
        '[{"name": "a", "rate": []}]',
        '[{"name": "a", "weights": "in the cloud"}]',
        '[{"name": "a", "weights": []}]',
        '[{"name": "a", "image": "yes"}]',
        '[{"name": "a", "state": "asleep"}]',
        '[{"name": "a", "url": "gopher://hole"}]',
        '[{"name": "a", "url": 5}]',
        '[{"name": "a", "url": "http://box", "key_env": "AWS_SECRET_ACCESS_KEY"}]',
        '[{"name": "a", "url": "http://box", "key_env": ""}]',
    ],
)
def test_files_of_nodes_that_say_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "nodes.json"
    path.write_text(content)
    with pytest.raises(RequestError):
        read_nodes([], str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_nodes([], str(tmp_path / "nodes.json"))


def test_a_file_of_facts(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    facts = {"memory_free": "64GiB", "rate": "2GB/s", "weights": "disk", "image": True}
    path.write_text(json.dumps([{"name": "a", **facts}, {"name": "b", "state": "parked"}]))
    first, second = ask_nodes(read_nodes([], str(path)), "0" * 64)
    assert (first.available, first.rate, first.weights) == (64 << 30, 2e9, "disk")
    assert (first.image, first.kind, first.error) == (True, "given", None)
    assert second.state == "parked"


# -- nodes that are asked ----------------------------------------------------------------------


@contextmanager
def answering(status: int, body: bytes, seen: list[Any], **headers: str) -> Iterator[str]:
    """A server on loopback that gives everybody one answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def asked(url: str, fingerprint: str = "0" * 64) -> NodeFacts:
    (found,) = ask_nodes(read_nodes([url], None), fingerprint)
    return found


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (401, b"", "it wants a key"),
        (404, b"", "answers 404"),
        (200, b"<html>", "no endpoint of coldframe"),
        (200, b"[]", "no endpoint of coldframe"),
        (200, b'{"models": {"m": {}}}', "no endpoint of coldframe"),
        (200, b'{"models": 5}', "no endpoint of coldframe"),
    ],
)
def test_what_is_no_endpoint_is_told(status: int, body: bytes, why: str) -> None:
    with answering(status, body, []) as url:
        found = asked(url)
    assert found.error is not None
    assert why in found.error


def model_said(**changed: Any) -> dict[str, Any]:
    said = {
        "state": "zero",
        "memory_available": 5,
        "fingerprint": "0" * 64,
        "weights": {"at": "disk"},
        "image": False,
        "last_start": {"ttft_s": 1.5, "tier": "fresh", "cache": "cold"},
    }
    return said | changed


NODE = Node("n", "http://n:8000", "COLDFRAME_NODE_KEY", {})


def test_an_answer_of_an_endpoint() -> None:
    found = facts_of(NODE, json.dumps({"models": {"m": model_said()}}).encode(), "0" * 64)
    assert (found.state, found.weights, found.available) == ("zero", "disk", 5)
    assert (found.last_ttft_s, found.last_tier, found.last_cache) == (1.5, "fresh", "cold")
    # One of before knows nothing of the cache.
    old = model_said(last_start={"ttft_s": 1.5, "tier": "fresh"})
    assert facts_of(NODE, json.dumps({"models": {"m": old}}).encode(), "0" * 64).last_cache is None


@pytest.mark.parametrize(
    "changed",
    [
        {"state": "asleep"},
        {"state": None},
        {"weights": {"at": "on the moon"}},
        {"weights": {"at": []}},
        {"weights": "disk"},
        {"memory_available": -1},
        {"memory_available": "5"},
        {"memory_available": True},
        {"memory_available": 10**30},
        {"memory_available": float("inf")},
        {"memory_available": float("nan")},
        {"last_start": {"ttft_s": float("-inf")}},
        {"last_start": [1]},
        {"last_start": {"tier": {}}},
    ],
)
def test_answers_of_another_version_are_told(changed: dict[str, Any]) -> None:
    body = json.dumps({"models": {"m": model_said(**changed)}}).encode()
    with answering(200, body, []) as url:
        found = asked(url)
    assert "no endpoint of coldframe" in str(found.error)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {name: ANYTHING | st.just(said) for name, said in model_said().items()}
)
ANSWERS = st.one_of(
    st.binary(),
    ANYTHING.map(lambda value: json.dumps(value).encode()),
    FIELDS.map(lambda said: json.dumps({"models": {"m": said}}).encode()),
    st.integers(1, 200_000).map(lambda depth: b"[" * depth),
    st.integers(1, 5000).map(lambda digits: b'{"models": ' + b"9" * digits + b"}"),
)


@given(ANSWERS)
def test_whatever_it_answers_is_a_fact_or_an_error_that_is_caught(body: bytes) -> None:
    try:
        found = facts_of(NODE, body, "0" * 64)
    except node_answers._BROKEN:
        return
    # And what is a fact can be told.
    assert found.state in STATES
    assert found.weights in PLACES
    assert json.loads(json.dumps([found.available, found.last_ttft_s], allow_nan=False))


@contextmanager
def raw(*said: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """A port that says something, whatever it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        over = threading.Event()

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                for part in said:
                    connection.sendall(part)
                    if over.wait(pause_s):
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"\x00" * 100,
        b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000,
        b"HTTP/1.1 200 OK\r\n\r\n" + b'{"a": "' + b"a" * (2 << 20),
        b"",
    ],
)
def test_what_is_no_http_is_told_and_the_others_are_ranked(said: bytes) -> None:
    good = json.dumps({"models": {"m": model_said()}}).encode()
    with raw(said) as bad, answering(200, good, []) as url:
        broken, sound = ask_nodes(read_nodes([bad, url], None), "0" * 64)
    assert broken.error is not None
    assert sound.error is None


@pytest.mark.parametrize(
    "said",
    [
        [b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", *[b" "] * 1000],
        [b"HTTP/1.1 200 OK\r\n", *[b"a: b\r\n"] * 90],
    ],
)
def test_one_that_drips_is_not_waited_for(said: list[bytes]) -> None:
    with raw(*said, pause_s=0.1) as url:
        (found,) = ask_nodes(read_nodes([url], None), "0" * 64, wait_s=0.2)
    assert "does not answer within" in str(found.error)


def test_nobody_there_is_told() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # and does not listen
        found = asked(f"127.0.0.1:{holder.getsockname()[1]}")
    assert "cannot be reached" in str(found.error)


def test_the_key_goes_to_that_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_NODE_KEY", "planted-key")
    seen: list[Any] = []
    there: list[Any] = []
    with answering(200, b"{}", there) as other, answering(302, b"", seen, location=other) as url:
        found = asked(url)
    ((path, headers),) = seen
    assert (path, headers["x-api-key"]) == ("/placement", "planted-key")
    assert there == []
    assert "302" in str(found.error)


def test_credentials_do_not_stand_in_urls() -> None:
    with pytest.raises(RequestError, match="credentials") as raised:
        read_nodes(["http://me:hunter2@box"], None)
    assert "hunter2" not in str(raised.value)


def test_a_peer_says_what_it_has_and_how_fast(
    demo_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_PEER_TOKEN", TOKEN)
    model = demo_model("llama")
    fingerprint = Checkpoint.open(model).fingerprint
    with serving(model) as peer:
        url = f"peer://{peer.host}:{peer.port}"
        found, other = asked(url, fingerprint), asked(url)
    assert (found.error, found.kind, found.weights) == (None, "peer", "memory")
    assert found.rate is not None
    assert found.rate > 0
    assert other.error == "it gives another model"


# -- where it would start fastest --------------------------------------------------------------


def here_of(model: Path) -> Here:
    """A machine whose fresh start takes a second, whose restored one a fifth."""
    plan = Plan.build(Checkpoint.open(model))
    memory = Footprint(1, 1, 1, {})
    fresh = Worker(0.1, 1.0, 0.001, 0.01, 0.002, 0.003, 0.001)
    restored = Worker(0.1, 0.2, 0.001, 0.01, 0.002, 0.003, 0.001)
    cells = {}
    for tier, worker in (("fresh", fresh), ("restored", restored)):
        for through in ("run", "http"):
            for weights in ("mapped", "copied"):
                cells[f"{tier}/{through}/{weights}"] = Cell(worker, memory)
    rates = Rates(3, 1000, 1.0, cells, {"warm": 0.01, "parked": 0.05})
    return Here(plan, rates, 1e9, 500_000_000)


def known(name: str, **facts: Any) -> NodeFacts:
    return NodeFacts(name, None, "given", available=facts.pop("available", 1 << 40), **facts)


def test_the_fastest_of_those_where_it_fits_comes_first(demo_model: Make) -> None:
    here = here_of(demo_model("llama"))
    nodes = [
        NodeFacts("lost", "it cannot be reached", "endpoint"),
        known("full", state="zero", weights="memory", available=1000),
        known("elsewhere", rate=1e5),
        known("disk", weights="disk"),
        known("cached", weights="page_cache"),
        known("image", weights="page_cache", image=True),
        known("parked", state="parked", weights="memory"),
        known("ready", state="ready", weights="memory", available=0),
        known("failed", state="failed", weights="memory"),
        known("proven", weights="disk", last_ttft_s=0.4, last_tier="fresh", last_cache="cold"),
        known("otherwise", weights="disk", last_ttft_s=0.4, last_tier="fresh", last_cache="warm"),
        known("restored once", weights="disk", last_ttft_s=0.4, last_tier="restored"),
        known("unknown"),
    ]
    places = ranked([of_node(node, here) for node in nodes])
    names = [place["name"] for place in places]
    assert names[:4] == ["ready", "parked", "image", "proven"]
    # What a start of another kind once took says nothing of this one.
    assert names[4:8] == ["cached", "disk", "otherwise", "restored once"]
    assert names[8:10] == ["elsewhere", "unknown"]
    assert {*names[10:12]} == {"full", "failed"}
    assert names[12] == "lost"
    assert [place["rank"] for place in places] == list(range(1, 14))
    by_name = {place["name"]: place for place in places}
    assert by_name["ready"]["tier"] == "warm"
    assert by_name["ready"]["fits"]  # what is there takes nothing more
    assert by_name["image"]["tier"] == "restored"
    assert not by_name["full"]["fits"]
    assert by_name["lost"]["ttft_s"] is None
    assert by_name["lost"]["why"] == ["it cannot be reached"]
    assert by_name["proven"]["ttft_s"] == 0.4
    # Nobody has said how fast weights would come there: this machine's disk says nothing of it.
    assert by_name["unknown"]["ttft_s"] is None
    assert by_name["unknown"]["fits"]
    nbytes = sum(stage.nbytes for stage in here.plan.stages)
    assert by_name["elsewhere"]["ttft_s"] == pytest.approx(0.1 + nbytes / 1e5 + 0.004)


def test_facts_that_are_given_win(demo_model: Make) -> None:
    with answering(200, b'{"models": {}}', []) as url:
        node = Node("n", url, "COLDFRAME_NODE_KEY", {"memory_free": 5, "weights": "disk"})
        (found,) = ask_nodes([node], "0" * 64)
    assert (found.available, found.weights, found.error) == (5, "disk", None)
