"""A worker's blocks, granted by a real memory service, also when its news come late."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.loader.client import MemoryClient
from coldframe.loader.errors import RequestError
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.runtime.kvpool import KvPool
from coldframe.runtime.launch import Launch
from coldframe.runtime.options import ReplicaOptions

Make = Callable[..., Path]
BLOCKS = 16
TOKENS = 32


@pytest.fixture
def launch(demo_model: Make, no_leaks: Path) -> Iterator[Launch]:
    """A memory service with 16 blocks, and nobody else."""
    options = ReplicaOptions(str(demo_model("llama")), run_dir=str(no_leaks))
    launch = Launch(options, Recorder("front"))
    launch.memory.send({"type": "kv", "block_bytes": 4096, "blocks": BLOCKS, "lease_s": 30.0})
    while (message := launch.memory.recv(timeout=10)) is not None:
        if message.kind == "listening":
            break
    yield launch
    launch.memory.close()
    launch.memory_child.wait()
    os.close(launch.lock)


@pytest.fixture
def client(launch: Launch) -> Iterator[MemoryClient]:
    client = MemoryClient(Channel.connect(os.path.join(launch.run_dir, "memory.sock")), "worker")
    client.wait_arenas()
    yield client
    client.close()


def opened(launch: Launch, request: str) -> None:
    launch.memory.send({"type": "open", "request": request})


def eventually(take: Callable[[], list[int] | None]) -> list[int]:
    deadline = time.monotonic() + 10
    while (blocks := take()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return blocks


def test_requests_get_all_their_blocks_at_once(launch: Launch, client: MemoryClient) -> None:
    pool = KvPool(client, BLOCKS, TOKENS)
    taken: list[int] = []
    for number, tokens in enumerate((1, 32, 33, 200)):
        opened(launch, f"r{number}")
        blocks = eventually(lambda n=number, t=tokens: pool.take(f"r{n}", 0, t))  # type: ignore[misc]
        assert len(blocks) == -(-tokens // TOKENS)
        taken += blocks
    assert len(set(taken)) == len(taken)


def test_more_than_there_is_can_never_be_had(launch: Launch, client: MemoryClient) -> None:
    opened(launch, "r")
    with pytest.raises(RequestError, match="at most 512 tokens"):
        KvPool(client, BLOCKS, TOKENS).take("r", 0, BLOCKS * TOKENS + 1)


def test_a_request_that_is_not_known_yet_is_asked_for_again(
    launch: Launch, client: MemoryClient
) -> None:
    # The front's `open` and the worker's question go over two sockets, so they may overtake.
    pool = KvPool(client, BLOCKS, TOKENS)
    assert pool.take("r", 0, 100) is None
    opened(launch, "r")
    assert len(eventually(lambda: pool.take("r", 0, 100))) == 4


def test_blocks_of_a_worker_whose_death_is_not_known_yet(
    launch: Launch, client: MemoryClient
) -> None:
    opened(launch, "r")
    other = Channel.connect(os.path.join(launch.run_dir, "memory.sock"))
    other.send({"type": "grant", "count": 4})
    granted = other.recv(timeout=10)
    assert granted is not None
    ask = {"type": "assign", "request": "r", "attempt": 0, "blocks": granted.body["blocks"]}
    other.send(ask)
    assigned = other.recv(timeout=10)
    assert assigned is not None
    assert assigned.body["taken"]
    pool = KvPool(client, BLOCKS, TOKENS)
    assert pool.take("r", 1, 100) is None
    other.close()
    assert len(eventually(lambda: pool.take("r", 1, 100))) == 4
    # What the dead one had is free again.
    client.drop("r")
    opened(launch, "all")
    pool.trim()
    launch.memory.send({"type": "release", "request": "r"})
    assert len(eventually(lambda: pool.take("all", 0, BLOCKS * TOKENS))) == BLOCKS


def test_reserved_blocks_come_back(launch: Launch, client: MemoryClient) -> None:
    pool = KvPool(client, BLOCKS, TOKENS)
    blocks = pool.reserve("r", BLOCKS * TOKENS)
    assert blocks is not None
    assert pool.reserve("s", 1) is None
    pool.put_back(blocks)
    assert pool.reserve("s", 1) is not None


def test_what_does_not_suffice_is_not_held_back(launch: Launch, client: MemoryClient) -> None:
    other = Channel.connect(os.path.join(launch.run_dir, "memory.sock"))
    other.send({"type": "grant", "count": 10})
    assert other.recv(timeout=10) is not None
    pool = KvPool(client, BLOCKS, TOKENS)
    assert pool.reserve("r", 1) is not None  # asked for a chunk of two, so one is left over
    assert pool.reserve("s", 10 * TOKENS) is None
    other.send({"type": "grant", "count": 5})
    granted = other.recv(timeout=10)
    assert granted is not None
    assert len(granted.body["blocks"]) == 5
    other.close()
