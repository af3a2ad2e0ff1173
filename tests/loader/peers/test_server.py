from __future__ import annotations

import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.arena import Reservation, Segment
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Extent, Plan, Run, Stage
from coldframe.loader.errors import CheckpointError, PlatformError, SourceBusy, SourceChanged
from coldframe.loader.memory import HostMemory
from coldframe.loader.peers.listener import listen
from coldframe.loader.peers.server import PeerServer, ServerLimits
from coldframe.loader.peers.serving import Offer
from coldframe.loader.sources.location import Peer
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.peer import peer_origin
from tests.loader.checkpoints.written import tensor, write_model
from tests.loader.peers.peer import TOKEN, Serving, offer_of, serving
from tests.loader.web.servers import nginx
from tests.loader.weights import layered, shard_files

# Long enough never to be reached where a test does not mean it.
PATIENT = ServerLimits(beat_s=0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = layered(tmp_path_factory.mktemp("peers") / "m", layers=3, nbytes=30_000)
    (root / "tokenizer.json").write_text('{"a": 1}')
    (root / ".secret.json").write_text("{}")
    (root / "notes").write_text("private")
    return root


def get(
    peer: Serving, path: str, *, method: str = "GET", token: str | None = TOKEN, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """One request over a connection of its own, by the standard library's client."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        named["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(peer.host, peer.port, timeout=20)
    try:
        connection.request(method, path, headers=named)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def error_of(body: bytes) -> dict[str, Any]:
    found = json.loads(body)
    assert isinstance(found, dict)
    return found


@contextmanager
def raw(peer: Serving) -> Iterator[socket.socket]:
    with socket.create_connection((peer.host, peer.port), timeout=20) as connection:
        yield connection


def ask(path: str, *lines: str, version: str = "1.1") -> bytes:
    head = [f"GET {path} HTTP/{version}", "Host: x", f"Authorization: Bearer {TOKEN}", *lines]
    return "\r\n".join([*head, "", ""]).encode()


def until_closed(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def shard_with(peer: Serving, stage: int) -> tuple[str, Extent]:
    extent = peer.plan.stages[stage].extents[0]
    return peer.checkpoint.shards[extent.shard].name, extent


def range_of(extent: Extent) -> str:
    return f"bytes={extent.file_offset}-{extent.file_offset + extent.length - 1}"


# -- what is served --------------------------------------------------------------------------------


def test_the_plan(model: Path) -> None:
    with serving(model, loaded=False) as peer:
        peer.bring(0, 2)
        response, body = get(peer, "/v1/plan")
        assert response.status == 200
        assert response.getheader("Content-Type") == "application/json"
        found = json.loads(body)
        assert found["plan"] == peer.plan.hash
        assert found["fingerprint"] == peer.checkpoint.fingerprint
        assert found["stages"] == [stage.name for stage in peer.plan.stages]
        assert (found["state"], found["ready"]) == ("loading", [0, 2])
        sizes = {path.name: path.stat().st_size for path in shard_files(model)}
        assert {shard["name"]: shard["size"] for shard in found["shards"]} == sizes
        peer.bring(1, 3, 4)
        peer.offer.gate.end(None)
        assert json.loads(get(peer, "/v1/plan")[1])["state"] == "loaded"
        response, body = get(peer, "/v1/plan", method="HEAD")
        assert response.status == 200
        assert int(response.getheader("Content-Length", "0")) > 100
        assert body == b""


def test_whole_shards(model: Path) -> None:
    with serving(model) as peer:
        for path in shard_files(model):
            response, body = get(peer, f"/v1/shards/{path.name}")
            assert response.status == 200
            assert body == path.read_bytes()
        # Counted behind the last byte, which may be here by then.
        size = sum(path.stat().st_size for path in shard_files(model))
        deadline = time.monotonic() + 10
        while peer.server.served_bytes != size and time.monotonic() < deadline:
            time.sleep(0.001)
        assert peer.server.served_bytes == size


@pytest.mark.parametrize(
    "wanted",
    ["0-0", "0-7", "0-50000", "5-", "-1", "-70000", "999999999-", "-0", "100-100000", "300-301"],
)
def test_ranges_are_answered_as_nginx_does(model: Path, wanted: str) -> None:
    path = shard_files(model)[0]
    with serving(model) as peer, nginx(model) as base:
        ours, our_body = get(peer, f"/v1/shards/{path.name}", Range=f"bytes={wanted}")
        connection = http.client.HTTPConnection(base.removeprefix("http://"))
        connection.request("GET", f"/{path.name}", headers={"Range": f"bytes={wanted}"})
        theirs = connection.getresponse()
        their_body = theirs.read()
        connection.close()
    assert ours.status == theirs.status
    assert ours.getheader("Content-Range") == theirs.getheader("Content-Range")
    if ours.status == 206:
        assert our_body == their_body
        assert ours.getheader("Accept-Ranges") == "bytes"


def test_every_byte_by_itself_and_its_neighbour(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", layers=2, nbytes=11, shards=1)
    content = shard_files(root)[0].read_bytes()
    with serving(root) as peer:
        connection = http.client.HTTPConnection(peer.host, peer.port)
        for start in range(len(content) - 1):
            headers = {"Range": f"bytes={start}-{start + 1}", "Authorization": f"Bearer {TOKEN}"}
            connection.request("GET", "/v1/shards/model.safetensors", headers=headers)
            response = connection.getresponse()
            assert response.read() == content[start : start + 2]
        connection.close()


def test_the_head_of_a_shard_before_any_of_it_is_in(model: Path) -> None:
    with serving(model, loaded=False) as peer:
        for shard in peer.checkpoint.shards:
            path = f"/v1/shards/{shard.name}"
            response, body = get(peer, path, Range=f"bytes=0-{shard.data_offset - 1}")
            assert response.status == 206
            assert body == (model / shard.name).read_bytes()[: shard.data_offset]
            response, body = get(peer, path, method="HEAD")
            assert response.status == 200
            assert response.getheader("Content-Length") == str(shard.size)


def test_small_files(model: Path) -> None:
    with serving(model) as peer:
        for name in ["config.json", "tokenizer.json"]:
            response, body = get(peer, f"/v1/files/{name}")
            assert response.status == 200
            assert body == (model / name).read_bytes()
        response, body = get(peer, "/v1/files/tokenizer.json", Range="bytes=1-3")
        assert (response.status, body) == (206, b'"a"')
        tag = response.getheader("ETag", "")
        assert get(peer, "/v1/files/tokenizer.json", If_Match=tag)[0].status == 200
        assert get(peer, "/v1/files/tokenizer.json", If_Match='"x"')[0].status == 412
        # A range of another version would not fit: all of this one.
        whole, _ = get(peer, "/v1/files/tokenizer.json", Range="bytes=1-3", If_Range='"x"')
        assert whole.status == 200


def test_the_index_says_what_the_directory_says(model: Path, tmp_path: Path) -> None:
    with serving(model) as peer:
        _, body = get(peer, "/v1/files/model.safetensors.index.json")
    ours = json.loads((model / "model.safetensors.index.json").read_bytes())
    assert json.loads(body)["weight_map"] == ours["weight_map"]
    single = layered(tmp_path / "m", shards=1)
    with serving(single) as peer:
        assert get(peer, "/v1/files/model.safetensors.index.json")[0].status == 404


def test_what_breaks_is_said_and_nothing_else_ends(model: Path) -> None:
    with serving(model) as peer:

        def broken(name: str, limit: int) -> bytes:
            raise ZeroDivisionError("unexpected")

        peer.offer._read_small = broken
        response, body = get(peer, "/v1/files/config.json")
        assert response.status == 500
        assert error_of(body)["got"] == "ZeroDivisionError('unexpected')"
        assert get(peer, "/v1/plan")[0].status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v2/plan",
        "/v1/files/",
        "/v1/files/absent.json",
        "/v1/files/.secret.json",
        "/v1/files/notes",
        "/v1/files/..%2Fm%2Fconfig.json",
        "/v1/files/%2Fetc%2Fhosts.json",
        "/v1/files/a%00.json",
        "/v1/files/model-00001-of-00002.safetensors",
        "/v1/shards/absent.safetensors",
        "/v1/shards/config.json",
        "/v1/shards/",
    ],
)
def test_what_is_not_there(model: Path, path: str) -> None:
    with serving(model) as peer:
        response, body = get(peer, path)
        assert response.status == 404
        assert error_of(body)["error"] == "SourceNotFound"


def test_peers_only_read(model: Path) -> None:
    with serving(model) as peer:
        response, _ = get(peer, "/v1/plan", method="DELETE")
        assert response.status == 405
        assert response.getheader("Allow") == "GET, HEAD"


def with_rotary_buffer(root: Path) -> Path:
    """A checkpoint with a tensor that no model uses, and so no arena needs to have."""
    names = ["model.embed_tokens.weight", "model.layers.0.rotary_emb.inv_freq", "model.layers.0.w"]
    return write_model(root, [[tensor(name, 100, seed) for seed, name in enumerate(names)]])


def test_what_models_do_not_use_is_read_where_the_checkpoint_is(tmp_path: Path) -> None:
    root = with_rotary_buffer(tmp_path / "m")
    content = (root / "model.safetensors").read_bytes()
    asked: list[tuple[str, int, int]] = []

    def read_rest(name: str, offset: int, buffer: memoryview) -> None:
        asked.append((name, offset, len(buffer)))
        buffer[:] = content[offset : offset + len(buffer)]

    with serving(root) as peer:
        (buffer,) = (t for t in peer.checkpoint.tensors.values() if "inv_freq" in t.name)
        path = "/v1/shards/model.safetensors"
        for start, stop in [(buffer.offset, buffer.offset + 99), (0, buffer.offset)]:
            response, body = get(peer, path, Range=f"bytes={start}-{stop}")
            assert response.status == 409
            assert error_of(body)["where"] == f"model.safetensors, bytes {start}-{stop}"
        assert get(peer, path, method="HEAD")[0].status == 200
        after = buffer.offset + 100
        assert get(peer, path, Range=f"bytes={after}-")[1] == content[after:]

        offer = Offer(
            peer.checkpoint,
            peer.plan,
            HostMemory(peer.memory),
            headers=[content[: peer.checkpoint.shards[0].data_offset]],
            read_small=lambda name, limit: b"",
            read_rest=read_rest,
        )
        for stage in peer.plan.stages:
            offer.gate.ready(stage.index)
        peer.server.offer(offer)
        assert get(peer, path)[1] == content
        wanted = f"bytes={buffer.offset + 9}-{after + 4}"
        assert get(peer, path, Range=wanted)[1] == content[buffer.offset + 9 : after + 5]
        assert asked == [
            ("model.safetensors", buffer.offset, 100),
            (asked[0][0], buffer.offset + 9, 91),
        ]


def test_a_service_does_not_stand_in_for_the_source_of_its_weights(tmp_path: Path) -> None:
    data = bytes((1 << 20) + 1)
    root = write_model(
        tmp_path / "m",
        [[("rotary_emb.inv_freq", "U8", [len(data)], data), tensor("model.layers.0.w", 5)]],
    )
    checkpoint, plan, _ = offer_of(root)
    shard = checkpoint.shards[0]
    offer = Offer(
        checkpoint,
        plan,
        HostMemory(memoryview(bytearray(plan.arena_bytes))),
        headers=[bytes(shard.data_offset)],
        read_small=lambda name, limit: b"",
        read_rest=lambda name, offset, buffer: None,
    )
    start = checkpoint.tensors["rotary_emb.inv_freq"].offset
    assert offer.find(shard.name, start, start + (1 << 20)) is not None
    assert offer.find(shard.name, start, start + (1 << 20) + 1) is None


@given(st.data())
def test_bytes_are_found_wherever_the_plan_puts_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.getbasetemp() / "found"
    if not root.exists():
        layered(root, layers=2, nbytes=50, shards=1)
    checkpoint = Checkpoint.open(root)
    content = (root / "model.safetensors").read_bytes()
    (shard,) = checkpoint.shards
    # Pieces of any size, in any order, with space between them, a few to an extent.
    inner = st.integers(shard.data_offset + 1, shard.size - 1)
    cuts = sorted(data.draw(st.sets(inner, max_size=12)))
    bounds = [shard.data_offset, *cuts, shard.size]
    pieces = list(pairwise(bounds))
    held = [data.draw(st.integers(0, 9)) > 0 for _ in pieces]
    places, end = {}, 0
    for piece in data.draw(st.permutations(pieces)):
        places[piece] = end
        end += piece[1] - piece[0] + 3
    memory = bytearray(end)
    extents = []
    for piece, there in zip(pieces, held, strict=True):
        if there:
            length = piece[1] - piece[0]
            run = Run(0, length, places[piece])
            extents.append(Extent(0, 0, piece[0], length, (run,)))
            memory[places[piece] : places[piece] + length] = content[piece[0] : piece[1]]
    plan = replace(Plan.build(checkpoint), stages=(Stage(0, "all", tuple(extents), 0),))

    def read_rest(name: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = content[offset : offset + len(buffer)]

    all_of_it = data.draw(st.booleans())
    offer = Offer(
        checkpoint,
        plan,
        HostMemory(memoryview(memory)),
        headers=[content[: shard.data_offset]],
        read_small=lambda name, limit: b"",
        read_rest=read_rest if all_of_it else None,
    )
    start = data.draw(st.integers(0, shard.size - 1))
    stop = data.draw(st.integers(start + 1, shard.size))
    found = offer.find(shard.name, start, stop)
    touched = [h for p, h in zip(pieces, held, strict=True) if p[0] < stop and p[1] > start]
    if not all(touched) and not all_of_it:
        assert found is None
        return
    assert found is not None
    offer.fill(shard.name, found)
    assert b"".join(found.parts) == content[start:stop]
    assert {need.stage for need in found.needs} == ({0} if any(touched) else set())
    assert all(touched) == (not found.rest)


def test_a_rank_with_a_slice_by_columns_has_nothing_to_serve(model: Path) -> None:
    checkpoint, plan, _ = offer_of(model)
    extent = plan.stages[1].extents[0]
    sliced = replace(extent, runs=(Run(0, 10, 0, count=3, stride=20),))
    stages = (*plan.stages[:1], replace(plan.stages[1], extents=(sliced,)), *plan.stages[2:])
    headers = [(model / s.name).read_bytes()[: s.data_offset] for s in checkpoint.shards]
    memory = memoryview(bytearray(plan.arena_bytes))
    offer = Offer(
        checkpoint,
        replace(plan, stages=stages),
        HostMemory(memory),
        headers=headers,
        read_small=lambda name, limit: b"",
    )
    name = checkpoint.shards[extent.shard].name
    assert offer.find(name, extent.file_offset, extent.file_offset + 5) is None


def test_a_header_of_another_shard_is_refused(model: Path) -> None:
    checkpoint, plan, _ = offer_of(model)
    with pytest.raises(CheckpointError) as caught:
        Offer(
            checkpoint,
            plan,
            HostMemory(memoryview(bytearray(plan.arena_bytes))),
            headers=[b"" for _ in checkpoint.shards],
            read_small=lambda name, limit: b"",
        )
    assert caught.value.where == checkpoint.shards[0].uri


def test_weights_that_are_mapped_elsewhere_are_served_from_there(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", shards=1)
    content = (root / "model.safetensors").read_bytes()
    plan = Plan.build(Checkpoint.open(root))
    fds = []
    for data in (content, bytes(len(content))):
        fds.append(os.memfd_create("weights"))
        os.write(fds[-1], data)
        os.ftruncate(fds[-1], plan.arena_bytes)
    reservation = Reservation(plan.arena_bytes)
    segments = [Segment(fd, 0, plan.arena_bytes, 0, False) for fd in fds]
    reservation.attach(segments[:1])
    _, _, offer = offer_of(root, reservation.view())
    with serving(root) as peer:
        peer.server.offer(offer)
        for stage in plan.stages:
            offer.gate.ready(stage.index)
        assert get(peer, "/v1/shards/model.safetensors")[1] == content
        reservation.attach(segments[1:])
        start = peer.checkpoint.shards[0].data_offset
        _, body = get(peer, "/v1/shards/model.safetensors", Range=f"bytes={start}-")
        assert body == bytes(len(content) - start)
    reservation.close()
    for fd in fds:
        os.close(fd)


# -- who may ask, and for what ---------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1]])
def test_without_the_token_there_is_nothing(model: Path, token: str | None) -> None:
    with serving(model) as peer:
        for path in ["/v1/plan", "/v1/files/config.json", "/absent"]:
            response, body = get(peer, path, token=token)
            assert response.status == 401
            assert response.getheader("WWW-Authenticate") == "Bearer"
            assert response.will_close
            assert error_of(body)["error"] == "SourceCredentials"
            assert TOKEN.encode() not in body


def test_on_this_machine_no_token_is_needed(model: Path) -> None:
    with serving(model, token=None) as peer:
        assert get(peer, "/v1/plan", token=None)[0].status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_token(host: str) -> None:
    listener = listen(host, 0)
    with pytest.raises(PlatformError) as caught:
        PeerServer(listener, None)
    assert caught.value.where == host
    assert "COLDFRAME_PEER_TOKEN" in caught.value.hint
    assert listener.fileno() == -1
    server = PeerServer(listen(host, 0), TOKEN)
    server.close()


def test_the_address_of_this_machine_in_both_families() -> None:
    for host in ["::1", "localhost"]:
        PeerServer(listen(host, 0), None).close()


@pytest.mark.parametrize("token", ["", "two words", "line\r\nX: y", "caf\xe9"])
def test_a_token_that_cannot_be_sent(token: str) -> None:
    listener = listen("127.0.0.1", 0)
    with pytest.raises(PlatformError) as caught:
        PeerServer(listener, token)
    assert caught.value.where == "COLDFRAME_PEER_TOKEN"
    assert not token or token not in str(caught.value)
    assert listener.fileno() == -1


def test_an_address_that_cannot_be_had() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for host in ["127.0.0.1", "192.0.2.1", "no such host"]:
            with pytest.raises(PlatformError) as caught:
                listen(host, port)
            assert caught.value.where == f"{host}:{port}"
            assert caught.value.got


@pytest.mark.parametrize("header", ["X-Coldframe-Plan", "X-Coldframe-Checkpoint"])
def test_who_has_planned_something_else_is_refused(model: Path, header: str) -> None:
    with serving(model) as peer:
        ours = {
            "X-Coldframe-Plan": peer.plan.hash,
            "X-Coldframe-Checkpoint": peer.checkpoint.fingerprint,
        }[header]
        path = f"/v1/shards/{peer.checkpoint.shards[0].name}"
        assert get(peer, path, **{header: ours})[0].status == 200
        for where in [path, "/v1/files/config.json"]:
            response, body = get(peer, where, **{header: "0" * 64})
            assert response.status == 412
            error = error_of(body)
            assert (error["error"], error["expected"], error["got"]) == (
                "SourceChanged",
                "0" * 64,
                ours,
            )


def test_two_models_of_the_same_shapes_have_other_versions(tmp_path: Path) -> None:
    roots = [
        write_model(tmp_path / name, [[tensor("model.layers.0.w", 100, seed)]])
        for seed, name in enumerate(["one", "two"])
    ]
    with serving(roots[0]) as one, serving(roots[1]) as two:
        assert one.checkpoint.fingerprint == two.checkpoint.fingerprint
        path = "/v1/shards/model.safetensors"
        tag = get(one, path)[0].getheader("ETag", "")
        assert get(one, path, If_Match=tag)[0].status == 200
        response, body = get(two, path, If_Match=tag, Range="bytes=0-7")
        assert response.status == 412
        assert error_of(body)["expected"] == tag


# -- the protocol ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        b"hello\r\n\r\n",
        b"GET /v1/plan HTTP/1.1\r\n\r\n",
        b"POST /v1/plan HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        ask("/v1/shards/model-00001-of-00002.safetensors", "Range: bytes=9-1"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # how a TLS client begins
    ],
)
def test_what_is_no_request_ends_the_connection(model: Path, request_: bytes) -> None:
    with serving(model) as peer, raw(peer) as connection:
        connection.sendall(request_ + ask("/v1/plan"))
        answered = until_closed(connection)
        assert answered.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert answered.count(b"\r\nDate: ") == 1


def test_a_head_without_end_is_not_collected(model: Path) -> None:
    with serving(model) as peer, raw(peer) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 16384)
        assert until_closed(connection).startswith(b"HTTP/1.1 431 ")


def test_requests_one_after_the_other_and_all_at_once(model: Path) -> None:
    with serving(model) as peer:
        connection = http.client.HTTPConnection(peer.host, peer.port)
        for _ in range(3):
            connection.request("GET", "/v1/plan", headers={"Authorization": f"Bearer {TOKEN}"})
            assert connection.getresponse().read().startswith(b"{")
        connection.close()
        with raw(peer) as pipeline:
            pipeline.sendall(b"\r\n" + ask("/absent") * 3 + ask("/v1/plan", "Connection: close"))
            answered = until_closed(pipeline)
            assert [answered.count(b"HTTP/1.1 404"), answered.count(b"HTTP/1.1 200")] == [3, 1]


def test_an_old_client_gets_one_answer(model: Path) -> None:
    with serving(model) as peer, raw(peer) as connection:
        connection.sendall(ask("/v1/plan", version="1.0"))
        assert b"Connection: close\r\n" in until_closed(connection)


@pytest.mark.parametrize("sent", [b"", b"GET /v1/plan HTTP/1.1\r\n"])
def test_who_asks_nothing_is_let_go(model: Path, sent: bytes) -> None:
    with (
        serving(model, limits=ServerLimits(idle_s=0.1, head_s=0.1)) as peer,
        raw(peer) as connection,
    ):
        connection.sendall(sent)
        assert until_closed(connection) == b""


def test_a_client_that_does_not_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(24 << 20)  # more than sockets hold
    root = write_model(tmp_path / "m", [[("model.layers.0.w", "U8", [len(data)], data)]])
    with (
        serving(root, limits=ServerLimits(stall_s=0.3)) as peer,
        socket.socket() as slow,
    ):
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        slow.connect((peer.host, peer.port))
        slow.sendall(ask("/v1/shards/model.safetensors"))
        _, body = get(peer, "/v1/shards/model.safetensors")
        assert body == (root / "model.safetensors").read_bytes()
        slow.settimeout(20)
        # It is cut off in the end, and does not get all.
        time.sleep(0.6)
        got = 0
        try:
            while part := slow.recv(1 << 20):
                got += len(part)
        except ConnectionResetError:
            pass
        assert got < len(body)


def test_one_connection_too_many_is_told_to_come_later(model: Path) -> None:
    with serving(model, limits=ServerLimits(connections=2)) as peer:
        with raw(peer) as one, raw(peer) as two:
            for connection in (one, two):
                connection.sendall(ask("/absent"))
                assert connection.recv(12) == b"HTTP/1.1 404"
            response, body = get(peer, "/v1/plan")
            assert response.status == 503
            assert response.getheader("Retry-After") == "1"
            assert error_of(body)["state"] == "busy"
        # Both have gone; that is noticed by threads, in their own time.
        deadline = time.monotonic() + 20
        while get(peer, "/v1/plan")[0].status != 200:
            assert time.monotonic() < deadline


# -- while it is loading ---------------------------------------------------------------------------


def test_a_stage_is_waited_for_with_signs_of_life(model: Path) -> None:
    with serving(model, loaded=False, limits=PATIENT) as peer, raw(peer) as connection:
        name, extent = shard_with(peer, 1)
        connection.sendall(ask(f"/v1/shards/{name}", f"Range: {range_of(extent)}"))
        answered = b""
        while answered.count(b"100 Continue\r\n\r\n") < 3:
            answered += connection.recv(1000)
        assert b" 206 " not in answered
        peer.bring(1)
        body = (model / name).read_bytes()[extent.file_offset :][: extent.length]
        while not answered.endswith(body):
            answered += connection.recv(65536)
        assert answered.count(b"HTTP/1.1 206 ") == 1


def test_the_standard_library_waits_for_a_stage(model: Path) -> None:
    with serving(model, loaded=False, limits=PATIENT) as peer:
        name, extent = shard_with(peer, 2)
        threading.Timer(0.2, peer.bring, [2]).start()
        response, body = get(peer, f"/v1/shards/{name}", Range=range_of(extent))
        assert response.status == 206
        assert body == (model / name).read_bytes()[extent.file_offset :][: extent.length]


def test_an_old_client_waits_in_silence(model: Path) -> None:
    with serving(model, loaded=False, limits=PATIENT) as peer, raw(peer) as connection:
        name, extent = shard_with(peer, 1)
        connection.sendall(ask(f"/v1/shards/{name}", f"Range: {range_of(extent)}", version="1.0"))
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        peer.bring(1)
        connection.settimeout(20)
        assert until_closed(connection).startswith(b"HTTP/1.1 206 ")


def test_stages_are_served_as_they_come_in(model: Path) -> None:
    with serving(model, loaded=False, limits=PATIENT) as peer:
        events: list[str] = []
        there = [threading.Event() for _ in peer.plan.stages]

        def fetch(stage: int) -> None:
            name, extent = shard_with(peer, stage)
            _, body = get(peer, f"/v1/shards/{name}", Range=range_of(extent))
            content = (model / name).read_bytes()
            assert body == content[extent.file_offset : extent.file_offset + extent.length]
            events.append(f"peer has {stage}")
            there[stage].set()

        threads = [threading.Thread(target=fetch, args=(s.index,)) for s in peer.plan.stages]
        for thread in threads:
            thread.start()
        for stage in peer.plan.stages:
            events.append(f"we have {stage.index}")
            peer.bring(stage.index)
            assert there[stage.index].wait(20)
        for thread in threads:
            thread.join()
        assert events == [f"{who} {s.index}" for s in peer.plan.stages for who in HAVE]


HAVE = ("we have", "peer has")


def test_patience_ends(model: Path) -> None:
    limits = ServerLimits(patience_s=0.1, beat_s=0.04)
    with serving(model, loaded=False, limits=limits) as peer:
        name, extent = shard_with(peer, 1)
        response, body = get(peer, f"/v1/shards/{name}", Range=range_of(extent))
        assert response.status == 503
        assert response.getheader("Retry-After") == "1"
        assert error_of(body)["state"] == "loading"
        assert not response.will_close


def test_a_load_that_fails_says_why_to_those_who_wait_and_come(model: Path) -> None:
    with serving(model, loaded=False) as peer:
        peer.bring(0)
        error = SourceChanged("a weight file was modified", where="/data/x", got="another time")
        timer = threading.Timer(0.1, peer.server.fail, [error])
        timer.start()
        for stage in (1, 0):
            name, extent = shard_with(peer, stage)
            response, body = get(peer, f"/v1/shards/{name}", Range=range_of(extent))
            timer.join()
            assert response.status == 503
            assert response.getheader("Retry-After") is None
            assert error_of(body) == {**error.to_wire(), "state": "failed"}
        assert json.loads(get(peer, "/v1/plan")[1])["state"] == "failed"


def test_who_comes_before_the_plan_waits_for_it(model: Path) -> None:
    _, plan, offer = offer_of(model)
    server = PeerServer(listen("127.0.0.1", 0), None, PATIENT)
    with socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(ask("/v1/plan", "Connection: close"))
        assert connection.recv(12) == b"HTTP/1.1 100"
        server.offer(offer)
        assert plan.hash.encode() in until_closed(connection)
    server.close()


def test_a_load_that_fails_before_its_plan(model: Path) -> None:
    server = PeerServer(listen("127.0.0.1", 0), None, PATIENT)
    with socket.create_connection(server.address, timeout=20) as connection:
        connection.sendall(ask("/v1/plan", "Connection: close"))
        assert connection.recv(12) == b"HTTP/1.1 100"
        server.fail(CheckpointError("there are no weights", where="s3://bucket"))
        answered = until_closed(connection)
        assert b"HTTP/1.1 503 " in answered
        assert b"there are no weights" in answered
    server.close()


def test_close_ends_those_who_wait_and_those_who_take(tmp_path: Path) -> None:
    data = bytes(24 << 20)
    root = write_model(
        tmp_path / "m",
        [[("model.layers.0.w", "U8", [len(data)], data), tensor("lm_head.weight", 10)]],
    )
    # That nothing is left behind is checked when the block ends.
    with serving(root, loaded=False) as peer, raw(peer) as idle, raw(peer) as waits:
        with raw(peer) as takes:
            peer.bring(1)
            end = f"bytes={peer.checkpoint.shards[0].size - 1}-"
            waits.sendall(ask("/v1/shards/model.safetensors", f"Range: {end}"))
            name, extent = shard_with(peer, 1)
            takes.sendall(ask(f"/v1/shards/{name}", f"Range: {range_of(extent)}"))
            assert takes.recv(12) == b"HTTP/1.1 206"
            started = time.monotonic()
            peer.server.close()
            # Not when their deadlines have passed, which are half a minute and more.
            assert time.monotonic() - started < 20
            assert idle.recv(1) == b""
            assert until_closed(waits) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((peer.host, peer.port))


def test_who_does_not_know_yet_what_it_will_serve_says_so_soon() -> None:
    """It may be waiting for the very peer that asks."""
    server = PeerServer(listen("127.0.0.1", 0), None, ServerLimits(plan_s=0.05))
    try:
        address = peer_origin(Peer(*server.address), limits=Limits(patience_s=0.2, hedges=0))
        with pytest.raises(SourceBusy, match="still loading"):
            address.check()
        address.close()
    finally:
        server.close()
