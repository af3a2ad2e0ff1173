from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import (
    CheckpointError,
    ColdframeError,
    DeviceError,
    DeviceFull,
    MemoryServiceGone,
    ReplicaError,
    SourceChanged,
    SourceNotFound,
    SourceUnreachable,
)
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.memory_service.board import BoardView, StageState
from coldframe.loader.process import make_run_dir, remove_run_dir, spawn_python
from coldframe.loader.sources.base import SEALED
from coldframe.loader.timeline import Span, now
from coldframe.loader.wire import MAX_FDS, Channel, Message
from tests.loader.checkpoints.written import tensor, write_model, write_shard
from tests.loader.weights import arena_tensors, evict, layered, reference, sealed, shard_files
from tests.support import no_threads_left

SERVICE = (
    "from coldframe.loader.memory_service.service import main; "
    "main(3, sys.argv[1], int(sys.argv[2]), first_ns)"
)
# Attaches, prints what the tensors hold, and stays until its input ends.
CLIENT = """
import hashlib, json, os, sys
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.wire import Channel
client = MemoryClient(Channel.connect(sys.argv[1]), "child")
plan, weights, kv = client.wait_arenas()
for stage in plan.stages:
    client.wait_stage(stage.index)
view = weights.view()
digests = {
    p.name: hashlib.sha256(view[p.arena_offset : p.arena_offset + p.nbytes]).hexdigest()
    for p in plan.placements.values()
}
maps = open("/proc/self/maps").read()
print(json.dumps({"tensors": digests, "address": weights.address, "maps": maps}), flush=True)
sys.stdin.read()
"""


class Service:
    """A memory service with this process as its owner."""

    def __init__(self, base: Path) -> None:
        self.run_dir, self.lock = make_run_dir(str(base))
        self.owner, theirs = Channel.pair()
        self.child = spawn_python(
            SERVICE,
            [self.run_dir, str(now())],
            theirs.fileno(),
            dict(os.environ),
            site_packages=False,
        )
        theirs.close()
        self.clients: list[MemoryClient] = []
        self.path = os.path.join(self.run_dir, "memory.sock")

    def load(self, root: Path, **options: Any) -> Service:
        self.owner.send({"type": "load", "model": str(root), **options})
        self.expect("listening")
        return self

    def kv(self, blocks: int = 4, block_bytes: int = 1000, lease_s: float = 30.0) -> Service:
        self.owner.send(
            {"type": "kv", "blocks": blocks, "block_bytes": block_bytes, "lease_s": lease_s}
        )
        return self

    def expect(self, kind: str) -> Message:
        while (message := self.owner.recv(timeout=20)) is not None:
            if message.kind == kind:
                return message
            for fd in message.fds:
                os.close(fd)
        raise AssertionError(f"the service ended without {kind}")

    def client(self, name: str = "test", **options: Any) -> MemoryClient:
        client = MemoryClient(self.connect(), name, **options)
        self.clients.append(client)
        return client

    def connect(self) -> Channel:
        return Channel.connect(self.path)

    def close(self) -> None:
        if self.lock < 0:
            return
        for client in self.clients:
            client.close()
        self.owner.close()
        until(lambda: self.child.poll() is not None)
        os.close(self.lock)
        self.lock = -1


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")  # a short path: that of a socket has 107 bytes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "m")


@pytest.fixture
def service(base: Path) -> Iterator[Service]:
    fds = len(os.listdir("/proc/self/fd"))
    with no_threads_left():
        made = Service(base)
        try:
            yield made
            made.close()
            assert made.child.wait() == 0
            assert not os.path.exists(made.run_dir)
        finally:
            made.child.kill()
            remove_run_dir(made.run_dir)
    assert len(os.listdir("/proc/self/fd")) == fds


def until(done: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (result := done()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


def wait_all(client: MemoryClient) -> dict[str, bytes]:
    plan, weights, _ = client.wait_arenas()
    for stage in plan.stages:
        client.wait_stage(stage.index)
    return arena_tensors(plan, weights.view())


def failed(service: Service) -> ColdframeError:
    return ColdframeError.from_wire(service.expect("failed").body["error"])


def frame(body: object) -> bytes:
    payload = json.dumps(body).encode()
    return len(payload).to_bytes(4, "big") + payload


@contextmanager
def deaf(path: str, first: bytes = b"") -> Iterator[socket.socket]:
    """A client that reads no more: who sends to it hears that it is gone, and not before."""
    with socket.socket(socket.AF_UNIX) as bare:
        bare.settimeout(20)
        bare.connect(path)
        if first:
            bare.sendall(first)
            seen = b""
            while b'"kv"' not in seen:  # the last of what an attached client is told at once
                seen += bare.recv(65536)
        bare.shutdown(socket.SHUT_RD)
        yield bare


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [False, True])
def test_processes_share_the_weights(copy: bool, service: Service, model: Path) -> None:
    service.load(model, copy=copy).kv()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, service.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    found = []
    for child in children:
        assert child.stdout is not None
        found.append(json.loads(child.stdout.readline()))
    for child in children:
        child.communicate(timeout=20)
        assert child.returncode == 0
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in reference(model).items()}
    weights = [line for line in found[0]["maps"].splitlines() if line.split()[1] == "r--s"]
    for path in shard_files(model):
        assert any(line.endswith(str(path)) for line in weights) is not copy
    assert any("coldframe-weights" in line for line in weights) is copy
    assert found[0]["tensors"] == found[1]["tensors"] == expected
    assert found[0]["address"] == found[1]["address"]


def test_cached_files_are_mapped(service: Service, model: Path) -> None:
    service.load(model).kv()
    plan = service.expect("plan")
    assert plan.body["mode"] == "mapped"
    assert plan.body["weights_bytes"] == sum(map(len, reference(model).values()))
    board = BoardView(plan.fds[0])
    loaded = service.expect("loaded").body
    assert (loaded["mode"], loaded["why"]) == ("mapped", None)
    assert {board.state(stage) for stage in range(board.stages)} == {StageState.READY}
    assert board.progress.done == board.progress.total > 0
    board.close()
    spans = [Span.from_wire(span) for span in loaded["spans"]]
    names = [span.name for span in spans]
    assert {"interpreter", "imports", "checkpoint_open", "plan", "weight_read"} <= set(names)
    assert all(span.process == "memory" and span.start_ns <= span.end_ns for span in spans)
    assert wait_all(service.client()) == reference(model)


def test_files_that_are_not_cached_are_copied(service: Service, model: Path) -> None:
    evict(shard_files(model)[1])
    service.load(model).kv()
    loaded = service.expect("loaded").body
    assert loaded["mode"] == "copied"
    assert "in the page cache" in loaded["why"]
    assert wait_all(service.client()) == reference(model)


def test_files_that_somebody_may_write_to_are_copied(service: Service, model: Path) -> None:
    with open(shard_files(model)[1], "r+b"):
        service.load(model).kv()
        loaded = service.expect("loaded").body
    assert loaded["mode"] == "copied"
    assert loaded["why"] == f"{shard_files(model)[1].name} is open for writing elsewhere"
    assert wait_all(service.client()) == reference(model)
    # The lease on the other shard was given back.
    with open(shard_files(model)[0], "r+b"):
        pass


@pytest.mark.parametrize("options", [{"copy": True}, {"throttle": 1e9}])
def test_no_mapping_where_it_is_forbidden(
    options: dict[str, Any], service: Service, model: Path
) -> None:
    service.load(model, **options)
    loaded = service.expect("loaded").body
    assert (loaded["mode"], loaded["why"]) == ("copied", None)


def test_weights_cannot_be_written_by_who_maps_them(service: Service, model: Path) -> None:
    code = CLIENT.replace("sys.stdin.read()", "view[0] = 1")
    service.load(model, copy=True).kv()
    done = subprocess.run([sys.executable, "-c", code, service.path], capture_output=True)
    assert done.returncode == -signal.SIGSEGV


def test_shared_memory_cannot_shrink_under_who_has_it_mapped(service: Service, model: Path) -> None:
    service.load(model, copy=True).kv()
    bare = service.connect()
    bare.send({"type": "hello", "name": "worker"})
    kinds = set()
    while not kinds >= {"segments", "kv"}:
        message = bare.recv(timeout=20)
        assert message is not None
        kinds.add(message.kind)
        for fd in message.fds:
            size = os.fstat(fd).st_size
            with pytest.raises(OSError, match=r"not permitted|Invalid argument"):
                os.ftruncate(fd, 0)
            assert os.fstat(fd).st_size == size > 0
            os.close(fd)
    bare.close()


def test_stages_come_while_the_load_goes_on_and_late_comers_get_all(
    service: Service, tmp_path: Path
) -> None:
    root = layered(tmp_path / "m", nbytes=100_000)
    service.load(root, throttle=2e6).kv()
    early = service.client("early")
    plan, weights, _ = early.wait_arenas()
    early.wait_stage(0)
    assert early.progress.done < early.progress.total
    assert not early.is_ready(plan.stages[-1].index)
    middle = service.client("middle")
    middle.wait_stage(0)
    for stage in plan.stages:
        early.wait_stage(stage.index)
        part = {
            p.name: bytes(weights.view(p.arena_offset, p.nbytes))
            for p in plan.placements.values()
            if p.stage <= stage.index
        }
        assert part.items() <= reference(root).items()
    assert wait_all(middle) == wait_all(service.client("late")) == reference(root)
    assert early.plan == middle.plan
    assert early.error is None


def test_more_shards_than_descriptors_in_a_message(service: Service, tmp_path: Path) -> None:
    names = [f"model.layers.{n}.w" for n in range(MAX_FDS + 10)]
    root = write_model(tmp_path / "m", [[tensor(name, 64, n)] for n, name in enumerate(names)])
    service.load(root).kv()
    assert service.expect("loaded").body["mode"] == "mapped"
    assert wait_all(service.client()) == reference(root)


# -- when somebody writes to mapped files ---------------------------------------------------------


def writer(path: Path) -> subprocess.Popen[str]:
    """A process that cuts a file and fills it with something else."""
    code = (
        "import os, sys\n"
        "print('asks', flush=True)\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "print('is in', flush=True)\n"
        "file.truncate(0)\n"
        "file.write(b'\\xff' * 100)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "asks\n"
    return child


def finished(child: subprocess.Popen[str]) -> bool:
    """Waits for a writer: whether it got in."""
    with child:
        assert child.stdout is not None
        assert child.wait(20) == 0
        return child.stdout.read() == "is in\n"


def test_a_writer_waits_until_the_weights_are_out_of_its_way(service: Service, model: Path) -> None:
    expected = reference(model)
    service.load(model).kv()
    client, other = service.client("one"), service.client("two")
    assert wait_all(client) == wait_all(other) == expected
    assert finished(writer(shard_files(model)[0]))
    assert shard_files(model)[0].read_bytes() == b"\xff" * 100
    assert wait_all(client) == wait_all(other) == expected
    with open("/proc/self/maps") as maps:
        assert str(model) not in maps.read()
    assert wait_all(service.client("late")) == expected
    # Who comes later is not in anybody's way any more.
    assert finished(writer(shard_files(model)[1]))
    assert wait_all(client) == expected


def test_a_writer_waits_for_every_worker_or_its_end(service: Service, model: Path) -> None:
    service.load(model).kv()
    slow = service.connect()
    slow.send({"type": "hello", "name": "slow"})
    quick = service.client("quick")
    expected = wait_all(quick)
    child = writer(shard_files(model)[0])
    try:
        until(lambda: next_kind(slow) == "remap")
        time.sleep(0.1)
        assert child.poll() is None
        assert shard_files(model)[0].stat().st_size > 100
        slow.close()
        assert finished(child)
    finally:
        child.kill()
        child.wait()
    assert wait_all(quick) == expected


def test_what_was_wished_while_weights_were_moved_is_done_after_it(
    service: Service, model: Path
) -> None:
    path = shard_files(model)[0]
    service.load(sealed(model)).kv()
    slow = service.connect()
    slow.send({"type": "hello", "name": "slow"})
    service.client("quick").wait_arenas()
    service.expect("loaded")
    child = writer(path)
    try:
        until(lambda: next_kind(slow) == "remap")
        service.owner.send({"type": "settle", "realign": False})
        assert service.expect("moved").body["verified"] != SEALED
        slow.close()
        assert finished(child)
    finally:
        child.kill()
        child.wait()
    assert service.expect("moved").body["verified"] == SEALED


def test_a_worker_that_dies_meanwhile_does_not_let_the_writer_in_on_another(
    service: Service, model: Path
) -> None:
    service.load(model).kv()
    with deaf(service.path, frame({"type": "hello", "name": "deaf"})):
        slow = service.connect()
        slow.send({"type": "hello", "name": "slow"})
        service.client("third").wait_arenas()  # the service knows all three
        child = writer(shard_files(model)[0])
        try:
            until(lambda: next_kind(slow) == "remap")
            time.sleep(0.1)
            assert child.poll() is None
            slow.close()
            assert finished(child)
        finally:
            child.kill()
            child.wait()


def next_kind(channel: Channel) -> str:
    message = channel.recv(timeout=20)
    assert message is not None
    for fd in message.fds:
        os.close(fd)
    return message.kind


@pytest.mark.heavy
def test_without_memory_for_a_copy_the_writer_stays_out_of_the_workers_way(
    service: Service, model: Path
) -> None:
    service.load(model).kv()
    client = service.client()
    expected = wait_all(client)
    # Stands for a machine without memory: the service may not make shared memory of that size.
    resource.prlimit(service.child.pid, resource.RLIMIT_FSIZE, (mmap.PAGESIZE, mmap.PAGESIZE))
    child = writer(shard_files(model)[0])
    try:
        error = failed(service)
        assert type(error) is DeviceError
        assert error.got == "File too large"
        assert until(lambda: client.error is not None)
        time.sleep(1.2)  # longer than the service's tick
        assert child.poll() is None
        assert client.weights is not None
        assert client.plan is not None
        assert arena_tensors(client.plan, client.weights.view()) == expected
        service.close()
        assert finished(child)
    finally:
        child.kill()
        child.wait()


# -- errors ---------------------------------------------------------------------------------------


def test_a_missing_checkpoint(service: Service, tmp_path: Path) -> None:
    service.load(tmp_path / "nothing")
    error = failed(service)
    assert type(error) is SourceNotFound
    assert error.where == str(tmp_path / "nothing")
    client = service.client()
    with pytest.raises(SourceNotFound) as caught:
        client.wait_arenas()
    assert str(caught.value) == str(error)


def test_a_bad_header_reaches_all(service: Service, model: Path) -> None:
    shard_files(model)[0].write_bytes(b"\xff" * 100)
    early = None
    service.load(model)
    error = failed(service)
    assert type(error) is CheckpointError
    assert error.where is not None
    assert shard_files(model)[0].name in error.where
    early = service.client()
    for wait in (early.wait_arenas, lambda: early.wait_stage(0), lambda: early.assign("r", 0, 1)):
        with pytest.raises(CheckpointError) as caught:
            wait()
        assert str(caught.value) == str(error)


def test_a_model_larger_than_the_memory(service: Service, tmp_path: Path) -> None:
    size = 10**12
    root = write_model(tmp_path / "m", [[tensor("model.layers.0.w", 1)]])
    header = {"model.layers.0.w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    path = root / "model.safetensors"
    write_shard(path, header)
    os.truncate(path, path.stat().st_size + size)  # sparse: it takes no space
    service.load(root)
    error = failed(service)
    assert type(error) is DeviceFull
    assert error.what == "not enough memory for the weights"
    assert error.expected is not None
    assert int(error.expected.removesuffix(" bytes").replace(",", "")) >= size
    assert error.got is not None
    assert 0 < int(error.got.split()[0].replace(",", "")) < size
    assert error.hint


def test_a_file_cut_in_the_middle_of_the_load(service: Service, tmp_path: Path) -> None:
    root = layered(tmp_path / "m", nbytes=100_000, shards=1)
    path = shard_files(root)[0]
    size = path.stat().st_size
    service.load(root, throttle=1e6).kv()
    client = service.client()
    plan, _, _ = client.wait_arenas()
    client.wait_stage(0)
    os.truncate(path, size // 2)
    with pytest.raises(SourceChanged) as caught:
        client.wait_stage(plan.stages[-1].index)
    assert caught.value.where == str(path)
    assert caught.value.expected == f"{size} bytes, unchanged"
    assert caught.value.got == f"byte {size // 2}"
    assert str(failed(service)) == str(caught.value)
    client.wait_stage(0)  # what is in stays in


def test_a_load_of_another_kind_ends_the_service(service: Service, model: Path) -> None:
    service.owner.send({"type": "load", "model": str(model), "nonsense": 1})
    assert until(lambda: service.child.poll() is not None)


# -- clients that misbehave -----------------------------------------------------------------------


def assign(request: str = "r", **more: Any) -> dict[str, Any]:
    return {"type": "assign", "request": request, "attempt": 0, **more}


def nonsense() -> dict[str, bytes]:
    return {
        "no frame": b"GET / HTTP/1.1\r\n\r\n",
        "no JSON": b"\0\0\0\2{]",
        "no object": frame([1]),
        "too deep": (100_000).to_bytes(4, "big") + b"[" * 100_000,
        "no kind": frame({}),
        "unknown": frame({"type": "explode"}),
        "private": frame({"type": "_on_hello"}),
        "not the owner": frame({"type": "load", "model": "/"}),
        "no KV for you": frame({"type": "kv", "blocks": 1, "block_bytes": 1, "lease_s": 1}),
        "missing": frame({"type": "hello"}),
        "too many": frame({"type": "hello", "name": "x", "more": 1}),
        "twice": frame({"type": "hello", "name": "x"}) * 2,
        "types": frame(assign(count="all", keys=[])),
        "half a block": frame(assign(count=0.5, keys=[])),
        "unhashable": frame({"type": "claim", "request": [], "attempt": 0}),
        "more keys than blocks": frame(assign(count=1, keys=["a", "b"])),
        "no keys": frame(assign(count=1, keys=5)),
        "keys of nothing": frame(assign(count=1, keys=[]))
        + frame({"type": "publish", "request": "r", "keys": ["a", "b"]}),
        "descriptors": frame({"type": "hello", "name": "x", "fds": 3}),
    }


def test_nonsense_harms_only_who_talks_it(service: Service, model: Path) -> None:
    service.load(model).kv(blocks=2)
    service.owner.send({"type": "open", "request": "r"})
    client = service.client()
    expected = wait_all(client)
    fds = f"/proc/{service.child.pid}/fd"
    before = len(os.listdir(fds))
    for what, data in nonsense().items():
        with socket.socket(socket.AF_UNIX) as bare:
            bare.settimeout(20)
            bare.connect(service.path)
            bare.sendall(data)
            bare.shutdown(socket.SHUT_WR) if what == "no frame" else None
            try:
                while bare.recv(65536):
                    pass
            except ConnectionResetError:
                pass
        assert client.progress.total, what
        client.close()
        client = service.client()
        assert wait_all(client) == expected
    assert until(lambda: len(os.listdir(fds)) <= before)


def test_descriptors_sent_to_the_service_are_closed(service: Service, model: Path) -> None:
    service.load(model).kv()
    client = service.client()
    client.wait_arenas()
    fds = f"/proc/{service.child.pid}/fd"
    before = len(os.listdir(fds))
    bare = service.connect()
    with open("/dev/null") as null:
        for _ in range(20):
            bare.send({"type": "renew", "request": "r"}, [null.fileno()] * 10)
    assert client.claim("r", 0) is None  # it answers
    until(lambda: len(os.listdir(fds)) == before + 1)
    bare.close()


# -- KV -------------------------------------------------------------------------------------------


def held(service: Service, client: MemoryClient, request: str, count: int) -> list[int]:
    """A request with so many blocks, which a worker holds."""
    service.owner.send({"type": "open", "request": request})
    got = until(lambda: client.assign(request, 0, count))
    assert got.reused == 0
    return got.blocks


def test_blocks_are_shared_memory_that_passes_from_hand_to_hand(
    service: Service, model: Path
) -> None:
    service.load(model).kv(blocks=4, block_bytes=1000)
    one, two = service.client("prefill"), service.client("decode")
    for client in (one, two):
        kv = client.wait_arenas()[2]
        assert (kv.blocks, kv.block_bytes, kv.nbytes) == (4, 1000, 4000)
    blocks = held(service, one, "r", 2)
    assert len(blocks) == 2
    assert one.kv is not None
    assert two.kv is not None
    one.kv.reservation.view()[2500] = 42
    assert two.kv.reservation.view()[2500] == 42
    one.publish("r", [])
    assert two.claim("r", 0) is None  # still held
    one.drop("r")
    assert two.claim("r", 0) == blocks
    assert one.claim("r", 0) is None
    assert one.assign("r", 0, 1) is None
    assert one.assign("unknown", 0, 1) is None


def test_published_blocks_go_to_who_begins_alike(service: Service, model: Path) -> None:
    service.load(model).kv(blocks=4)
    one, two = service.client("one"), service.client("two")
    blocks = held(service, one, "r", 3)
    one.publish("r", ["a", "ab"])
    one.finish("r")
    service.owner.send({"type": "open", "request": "s"})
    got = until(lambda: two.assign("s", 0, 3, ["a", "ab", "abc"]))
    assert got.reused == 2
    assert got.blocks[:2] == blocks[:2]
    service.owner.send({"type": "usage"})
    usage = service.expect("usage").body
    assert (usage["kv_used"], usage["kv_cached"], usage["kv_reused"]) == (3, 0, 2)
    two.finish("s")
    assert two.claim("s", 0) is None  # in this order: it has let go
    service.owner.send({"type": "usage"})
    usage = service.expect("usage").body
    assert (usage["kv_used"], usage["kv_cached"], usage["kv_reused"]) == (0, 2, 2)


def test_blocks_come_back_when_a_worker_dies(service: Service, model: Path) -> None:
    service.load(model).kv(blocks=4)
    news = threading.Event()
    one, two = service.client("one"), service.client("two", on_event=news.set)
    blocks = held(service, one, "r", 2)
    one.publish("r", [])
    held(service, one, "half", 2)
    service.owner.send({"type": "open", "request": "s"})
    assert two.assign("s", 0, 1) is None
    assert not two.may_assign
    news.clear()
    one.close()
    assert news.wait(20)
    assert two.may_assign
    assert until(lambda: two.claim("r", 1)) == blocks  # what it had written is still there
    assert two.claim("half", 1) is None
    assert until(lambda: two.assign("half", 1, 2)).reused == 0


def test_who_asks_too_early_hears_when_to_ask_again(service: Service) -> None:
    # The front's `open` and the worker's question go over two sockets, so they may overtake.
    service.kv(blocks=4).expect("listening")
    news = threading.Event()
    client = service.client("one", on_event=news.set)
    assert news.wait(20)  # the arena, the one thing that there is to be told of
    news.clear()
    assert client.assign("r", 0, 1) is None
    assert not client.may_assign
    assert not news.is_set()  # an answer is no news
    service.owner.send({"type": "open", "request": "r"})
    assert news.wait(20)
    assert client.may_assign
    assert client.assign("r", 0, 1) is not None


def test_nothing_is_booked_on_a_worker_that_is_gone(service: Service, model: Path) -> None:
    service.load(model).kv(blocks=4)
    client = service.client()
    client.wait_arenas()
    for request in ("a", "b", "c", "d", "all"):
        service.owner.send({"type": "open", "request": request})
    service.owner.send({"type": "usage"})
    service.expect("usage")
    with deaf(service.path) as bare:
        # The first answer finds nobody; the other questions were read with its one.
        bare.sendall(b"".join(frame(assign(request, count=1, keys=[])) for request in "abcd"))
        hung_up = select.poll()
        hung_up.register(bare, 0)
        assert hung_up.poll(20_000)
        # What it did get waits for a successor; the requests after it have nothing.
        service.owner.send({"type": "release", "request": "a"})
        got = until(lambda: client.assign("all", 0, 4))
    assert sorted(got.blocks) == [0, 1, 2, 3]


def test_a_cancelled_request_keeps_its_blocks_while_they_are_held(
    service: Service, model: Path
) -> None:
    service.load(model).kv(blocks=2)
    one, two = service.client("one"), service.client("two")
    held(service, one, "r", 2)
    service.owner.send({"type": "release", "request": "r"})
    service.owner.send({"type": "open", "request": "s"})
    service.owner.send({"type": "usage"})
    assert service.expect("usage").body["kv_used"] == 2
    assert two.assign("s", 0, 1) is None
    one.drop("r")
    assert until(lambda: two.assign("s", 0, 2)) is not None


def test_the_owner_is_told_what_is_in_use(service: Service, model: Path) -> None:
    service.load(model)
    service.expect("loaded")
    service.owner.send({"type": "usage"})
    assert service.expect("usage").body["kv_total"] == 0  # no KV has been sized yet
    service.kv(blocks=4)
    one = service.client("one")
    held(service, one, "r", 2)
    service.owner.send({"type": "usage"})
    usage = service.expect("usage").body
    assert (usage["kv_used"], usage["kv_total"]) == (2, 4)
    assert usage["bytes_done"] > 0
    one.drop("r")
    service.owner.send({"type": "release", "request": "r"})
    service.owner.send({"type": "usage"})
    assert service.expect("usage").body["kv_used"] == 0


def test_only_the_owner_is_told_what_is_in_use(service: Service, model: Path) -> None:
    service.load(model)
    stranger = service.connect()
    stranger.send({"type": "usage"})
    assert stranger.recv(timeout=20) is None
    stranger.close()


def test_requests_end_with_their_gateway(service: Service, model: Path) -> None:
    service.load(model).kv(blocks=2)
    gateway = service.connect()
    gateway.send({"type": "open", "request": "r"})
    one = service.client("one")
    assert until(lambda: one.assign("r", 0, 2)) is not None
    one.publish("r", [])
    one.drop("r")
    service.owner.send({"type": "open", "request": "s"})
    assert one.assign("s", 0, 1) is None
    gateway.close()
    assert until(lambda: one.assign("s", 0, 2)) is not None
    assert one.claim("r", 0) is None


def test_a_lease_runs_out_unless_it_is_renewed(service: Service, model: Path) -> None:
    service.load(model).kv(blocks=2, lease_s=0.2)
    news = threading.Event()
    one, two = service.client("one"), service.client("two", on_event=news.set)
    blocks = {request: held(service, one, request, 1) for request in ("r", "kept")}
    for request in blocks:
        one.publish(request, [])
        one.drop(request)
    stop = threading.Event()

    def renew() -> None:
        while not stop.wait(0.02):
            one.renew("kept")

    renewer = threading.Thread(target=renew)
    renewer.start()
    service.owner.send({"type": "open", "request": "s"})
    assert two.assign("s", 0, 2) is None
    assert news.wait(20)
    assert until(lambda: two.assign("s", 0, 1)).blocks == blocks["r"]
    assert two.claim("r", 0) is None
    stop.set()
    renewer.join()
    assert two.claim("kept", 0) == blocks["kept"]


def test_who_waits_hears_of_what_a_new_attempt_has_freed(service: Service, model: Path) -> None:
    service.load(model).kv(blocks=3)
    news = threading.Event()
    one, two = service.client("one"), service.client("two", on_event=news.set)
    held(service, one, "r", 2)
    one.drop("r")
    service.owner.send({"type": "open", "request": "s"})
    assert until(lambda: two.assign("s", 0, 2) is None and not two.may_assign)
    news.clear()
    assert one.assign("r", 1, 1) is not None
    assert news.wait(20)
    assert two.assign("s", 0, 2) is not None


def test_kv_without_room_for_it(service: Service, model: Path) -> None:
    service.load(model).kv(blocks=1 << 40, block_bytes=1 << 30)
    error = failed(service)
    assert type(error) is DeviceFull
    assert error.what == "not enough memory for the kv"


# -- ends -----------------------------------------------------------------------------------------


def test_the_service_ends_with_its_owner_in_the_middle_of_a_load(base: Path, model: Path) -> None:
    """The fixture sees to the ordinary end; here the owner is killed."""
    code = (
        "import os, sys, time\n"
        "from coldframe.loader.process import make_run_dir, spawn_python\n"
        "from coldframe.loader.wire import Channel\n"
        "run_dir, lock = make_run_dir(sys.argv[1])\n"
        "ours, theirs = Channel.pair()\n"
        f"child = spawn_python({SERVICE!r}, [run_dir, '0'], theirs.fileno(), dict(os.environ))\n"
        "theirs.close()\n"
        "ours.send({'type': 'load', 'model': sys.argv[2], 'throttle': 1000.0})\n"
        "ours.recv()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(base), str(model)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert os.path.exists(f"/proc/{pid}")
        assert len(list(base.iterdir())) == 1
        owner.kill()
    until(lambda: not alive(pid))
    assert list(base.iterdir()) == []


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def doomed(base: Path) -> Iterator[Service]:
    """A service that the test does away with itself."""
    made = Service(base)
    yield made
    made.child.kill()
    made.close()
    remove_run_dir(made.run_dir)


def test_clients_learn_that_the_service_was_killed(doomed: Service, model: Path) -> None:
    doomed.load(model, throttle=10_000.0).kv()
    client = doomed.client()
    plan, _, _ = client.wait_arenas()
    outcome: list[Exception] = []

    def wait() -> None:
        try:
            client.wait_stage(plan.stages[-1].index)
        except ColdframeError as error:
            outcome.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert doomed.child.kill() == -signal.SIGKILL
    waiter.join(20)
    assert [type(error) for error in outcome] == [MemoryServiceGone]
    with pytest.raises(ReplicaError, match="gone"):
        client.claim("r", 0)
    with pytest.raises(ReplicaError):
        client.wait_stage(plan.stages[-1].index)
    while (message := doomed.owner.recv(timeout=20)) is not None:
        for fd in message.fds:
            os.close(fd)
    with pytest.raises(ReplicaError, match="cannot reach"):
        doomed.client()


@pytest.mark.heavy
def test_a_service_that_stands_still_is_an_error(doomed: Service, model: Path) -> None:
    doomed.load(model, throttle=10_000.0).kv()
    doomed.client("patient").wait_arenas()  # so that the other has nothing to wait for
    client = doomed.client(stall_s=1.0)
    plan, _, _ = client.wait_arenas()
    os.kill(doomed.child.pid, signal.SIGSTOP)
    asked: list[Exception] = []

    def ask() -> None:
        try:
            client.claim("r", 0)
        except ColdframeError as error:
            asked.append(error)

    asker = threading.Thread(target=ask)
    with pytest.raises(SourceUnreachable, match="no byte of the weights came in for 1 s") as caught:
        client.wait_stage(plan.stages[-1].index)
    assert caught.value.where == f"stage {plan.stages[-1].index}"
    asker.start()
    asker.join(20)
    assert [type(error) for error in asked] == [ReplicaError]
    # A late answer must not be taken for the one to the next question.
    os.kill(doomed.child.pid, signal.SIGCONT)
    with pytest.raises(ReplicaError, match="does not answer"):
        client.claim("r", 0)


# -- weights laid out anew ------------------------------------------------------------------------


def tensors_of(client: MemoryClient) -> dict[str, bytes]:
    assert client.plan is not None
    assert client.weights is not None
    return arena_tensors(client.plan, client.weights.view())


@pytest.mark.parametrize("copy", [False, True])
def test_weights_are_laid_out_anew_while_workers_use_them(
    copy: bool, service: Service, model: Path
) -> None:
    service.load(model, copy=copy).kv()
    clients = [service.client(f"worker-{n}") for n in range(2)]
    for client in clients:
        client.wait_arenas()
    service.expect("loaded")
    before = [tensors_of(client) for client in clients]
    plans = [client.plan for client in clients]
    assert all(plan is not None and plan.layout == "file" for plan in plans)
    service.owner.send({"type": "settle", "realign": True})
    moved = service.expect("moved").body
    assert moved["mode"] == "copied"
    assert "realign" in [span[0] for span in moved["spans"]]
    for client, plan, expected in zip(clients, plans, before, strict=True):
        # Until the worker takes them, it has them where they were.
        assert client.plan is plan
        assert tensors_of(client) == expected
        until(lambda c=client: c.take_relaid() is not None)  # type: ignore[misc]
        assert client.plan is not None
        assert client.plan.layout == "aligned"
        assert all(p.arena_offset % 256 == 0 for p in client.plan.placements.values())
        assert tensors_of(client) == expected
        client.let_go_of_old()
    # Who comes now gets the new place at once, and a writer is not held back by the old one.
    late = service.client("late")
    assert late.wait_arenas()[0].layout == "aligned"
    assert tensors_of(late) == before[0]
    path = shard_files(model)[0]
    until(lambda: writable(path))
    # There is nothing more to gain, so nothing happens.
    service.owner.send({"type": "settle", "realign": True})
    service.kv()


def writable(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return False
    return True


def test_only_the_owner_has_weights_laid_out_anew(service: Service, model: Path) -> None:
    service.load(model).kv()
    client = service.client()
    client.wait_arenas()
    service.expect("loaded")
    client._link.send({"type": "settle", "realign": True})
    with pytest.raises(ReplicaError):
        until(lambda: client.is_ready(99))
