"""The KV store in a memory service of its own process: published, killed, found again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import MemoryServiceGone
from coldframe.loader.kv.ledger import Blocks
from coldframe.loader.kv.options import KvStoreOptions
from coldframe.loader.memory_client.client import MemoryClient
from coldframe.loader.process import remove_run_dir
from coldframe.loader.wire import Message
from tests.loader.kv.test_disk import key
from tests.loader.memory_service.test_service import Service, until
from tests.loader.weights import layered, sealed

BLOCK = 6000
BLOCKS = 16


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "m")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "kv"


class Kept(Service):
    """A service with a store, and one worker."""

    worker: MemoryClient

    def begin(self, model: Path, store: Path | None, memory: int = 0, **options: Any) -> Kept:
        self.load(model, **options)
        place = None if store is None else str(store)
        kept = KvStoreOptions(place, memory=memory * BLOCK, kv_format="test")
        sizes = {"blocks": BLOCKS, "block_bytes": BLOCK, "lease_s": 30.0}
        self.owner.send({"type": "kv", **sizes, "store": kept.to_wire()})
        self.expect("loaded")
        self.worker = self.client()
        self.worker.wait_arenas()
        return self

    def usage(self) -> dict[str, int]:
        self.owner.send({"type": "usage"})
        message: Message = self.expect("usage")
        return message.body

    def assign(self, request: str, count: int, numbers: range) -> Blocks:
        """What a worker gets that asks until it has something."""
        self.owner.send({"type": "open", "request": request})
        names = [key(number) for number in numbers]
        got: list[Blocks] = []

        def ask() -> bool:
            if self.worker.may_assign:
                found = self.worker.assign(request, 0, count, names)
                got.extend([] if found is None else [found])
            return bool(got)

        until(ask)
        return got[0]

    def serve(self, request: str, numbers: range) -> int:
        """A request from its start to its end: how many blocks were there already."""
        got = self.assign(request, len(numbers), numbers)
        assert self.worker.kv is not None
        view = self.worker.kv.reservation.view()
        for place, number in enumerate(numbers):
            block, data = got.blocks[place], bytes([number + 1]) * BLOCK
            if place < got.reused:
                assert view[block * BLOCK : (block + 1) * BLOCK] == data
            else:
                view[block * BLOCK : (block + 1) * BLOCK] = data
        self.worker.publish(request, [key(number) for number in numbers])
        self.worker.finish(request)
        self.owner.send({"type": "release", "request": request})
        until(lambda: self.usage()["kv_used"] == 0)
        return got.reused


Open = Callable[..., Kept]


@pytest.fixture
def opened(base: Path) -> Iterator[Open]:
    """Starts services, one after the other; all of them end well, or have been killed."""
    made: list[Kept] = []

    def begin(*args: Any, **options: Any) -> Kept:
        made.append(Kept(base))
        return made[-1].begin(*args, **options)

    try:
        yield begin
        for kept in made:
            kept.close()
    finally:
        for kept in made:
            kept.child.kill()
            remove_run_dir(kept.run_dir)


@contextmanager
def once(opened: Open, *args: Any, **options: Any) -> Iterator[Kept]:
    """A service that ends in good order."""
    kept = opened(*args, **options)
    yield kept
    kept.close()
    assert kept.child.wait() == 0


def test_it_outlives_the_service_that_ends(opened: Open, model: Path, store: Path) -> None:
    with once(opened, model, store) as first:
        assert first.serve("r", range(5)) == 0
        assert first.serve("s", range(7)) == 5
    with once(opened, model, store) as second:
        assert second.serve("r", range(9)) == 7
        usage = second.usage()
        assert (usage["kv_store_disk_loaded"], usage["kv_reused"]) == (7, 7)


@pytest.mark.heavy
def test_it_outlives_the_service_that_is_killed(opened: Open, model: Path, store: Path) -> None:
    first = opened(model, store)
    first.serve("r", range(5))
    until(lambda: first.usage()["kv_store_disk_stored"] == 5)
    first.child.kill()
    with pytest.raises(MemoryServiceGone):
        first.worker.wait_stage(99)
    first.close()
    with once(opened, model, store) as second:
        assert second.serve("r", range(5)) == 5


@pytest.mark.parametrize("memory", [pytest.param(0, marks=pytest.mark.heavy), BLOCKS])
def test_it_outlives_the_arenas_memory(opened: Open, model: Path, store: Path, memory: int) -> None:
    with once(opened, model, store, memory) as kept:
        kept.serve("r", range(5))
        kept.owner.send({"type": "discard"})
        until(lambda: kept.usage()["kv_cached"] == 0)
        assert kept.serve("s", range(5)) == 5
        loaded = "kv_store_memory_loaded" if memory else "kv_store_disk_loaded"
        assert kept.usage()[loaded] == 5
        # A request that comes with the order to rest keeps its blocks.
        kept.owner.send({"type": "discard"})
        assert kept.serve("t", range(6)) == 5
        kept.owner.send({"type": "discard"})
        until(lambda: kept.usage()["kv_cached"] == 0)
        assert kept.serve("u", range(6)) == 6


def test_host_memory_alone_keeps_what_makes_room(opened: Open, model: Path) -> None:
    with once(opened, model, None, BLOCKS) as kept:
        for number in range(4):
            assert kept.serve(f"r{number}", range(10 * number, 10 * number + 8)) == 0
        assert kept.serve("s", range(20, 28)) == 8  # still in the arena
        assert kept.serve("t", range(8)) == 8
        usage = kept.usage()
        assert usage["kv_store_memory_loaded"] == 8
        assert usage["kv_store_disk_stored"] == 0


def test_other_weights_of_the_same_shapes_are_another_model(
    opened: Open, model: Path, store: Path
) -> None:
    with once(opened, model, store) as first:
        first.serve("r", range(5))
    for shard in model.glob("*.safetensors"):  # trained on, say
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    with once(opened, model, store) as second:
        assert second.serve("r", range(5)) == 0


@pytest.mark.heavy
def test_sealed_weights_are_known_wherever_they_lie(
    opened: Open, model: Path, store: Path, tmp_path: Path
) -> None:
    sealed(model)
    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    with once(opened, model, store, copy=True) as first:
        first.serve("r", range(5))
    with once(opened, copied, store, copy=True) as second:
        assert second.serve("r", range(5)) == 5


@pytest.mark.heavy
def test_nothing_is_written_of_weights_that_were_not_held_against_their_seal(
    opened: Open, model: Path, store: Path
) -> None:
    sealed(model)
    with once(opened, model, store) as kept:  # mapped: it is looked at behind the first token
        kept.serve("r", range(5))
        time.sleep(0.1)
        assert kept.usage()["kv_store_disk_stored"] == 0
        kept.owner.send({"type": "settle", "realign": False})
        until(lambda: kept.usage()["kv_store_disk_stored"] == 5)


def test_a_key_that_could_name_another_file_harms_only_who_gives_it(
    opened: Open, model: Path, store: Path
) -> None:
    with once(opened, model, store) as kept:
        kept.serve("r", range(2))
        kept.owner.send({"type": "open", "request": "s"})
        stranger = kept.client("stranger")
        with pytest.raises(MemoryServiceGone):
            stranger.assign("s", 0, 2, ["../../../../etc/passwd"])
        assert kept.serve("t", range(2)) == 2


@pytest.mark.heavy
def test_two_services_share_a_directory(opened: Open, model: Path, store: Path) -> None:
    with once(opened, model, store) as first, once(opened, model, store) as second:
        first.serve("r", range(6))
        until(lambda: first.usage()["kv_store_disk_stored"] == 6)
        assert second.serve("r", range(8)) == 6
        until(lambda: second.usage()["kv_store_disk_stored"] == 2)
        for path in store.rglob("*"):
            if path.is_file() and path.name == key(1):
                os.truncate(path, 7)
        third = opened(model, store)
        assert third.serve("r", range(8)) == 1
        assert third.usage()["kv_store_corrupt"] == 1
    # It was computed anew, and written.
    until(lambda: third.usage()["kv_store_disk_stored"] == 1)
    with once(opened, model, store) as fourth:
        assert fourth.serve("r", range(8)) == 8


@pytest.mark.heavy
def test_a_request_that_ends_while_it_waits_leaves_no_block(
    opened: Open, model: Path, store: Path
) -> None:
    with once(opened, model, store) as first:
        first.serve("r", range(8))
    with once(opened, model, store) as kept:
        names = [key(number) for number in range(8)]
        for number in range(20):
            request = f"r{number}"
            kept.owner.send({"type": "open", "request": request})
            other = kept.client(request)
            other.wait_arenas()
            other.assign(request, 0, 12, names)
            kept.owner.send({"type": "release", "request": request})
            if number % 2:
                other.close()
                kept.clients.remove(other)
            else:
                other.finish(request)
            until(lambda: kept.usage()["kv_used"] == 0)
        assert kept.serve("s", range(8)) == 8
