"""Memory services of two GPUs, the second of which takes weights and KV from the first."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from coldframe.loader.arena import Segment
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.errors import (
    ArenaError,
    ColdframeError,
    DeviceFull,
    MemoryServiceGone,
    ReplicaError,
)
from coldframe.loader.kv.ledger import Blocks
from tests.loader.devices.emulator import Emulator
from tests.loader.devices.test_service_cuda import Served, Worker, in_threads, until
from tests.loader.weights import layered, reference

BLOCK = 1000


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    made = Emulator(devices=2)
    yield made
    left = made.left()
    made.close()
    assert made.is_lost or left == []


@pytest.fixture
def pair(
    emulator: Emulator,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[], tuple[Served, Served]]]:
    in_threads(monkeypatch, emulator)
    made: list[Served] = []

    def make() -> tuple[Served, Served]:
        model = layered(tmp_path / "m")
        made.append(Served(emulator, tmp_path_factory.mktemp("a"), model))
        path = made[0].path
        made.append(Served(emulator, tmp_path_factory.mktemp("b"), model, 1, beside=path))
        return made[0], made[1]

    yield make
    for one in reversed(made):
        one.close()


def put(worker: Worker, block: int, data: bytes) -> None:
    assert worker.client.kv is not None
    ctypes.memmove(worker.client.kv.reservation.address + block * BLOCK, data, len(data))


def got(worker: Worker, block: int) -> bytes:
    assert worker.client.kv is not None
    return ctypes.string_at(worker.client.kv.reservation.address + block * BLOCK, BLOCK)


def content(number: int) -> bytes:
    return bytes([number + 1]) * BLOCK


def written(worker: Worker, request: str, count: int, keys: tuple[str, ...] = ()) -> list[int]:
    """Blocks of a request that hold KV, left for who goes on with it."""
    found: list[Blocks | None] = []

    def assigned() -> bool:
        found.append(worker.client.assign(request, 0, count))
        return found[-1] is not None

    until(assigned)
    blocks = found[-1]
    assert blocks is not None
    for number, block in enumerate(blocks.blocks):
        put(worker, block, content(number))
    worker.client.publish(request, keys)
    worker.client.drop(request)
    return blocks.blocks


def test_weights_come_from_the_other_gpu_stage_by_stage(
    pair: Callable[[], tuple[Served, Served]], emulator: Emulator
) -> None:
    emulator.hold()
    first, second = pair()
    emulator.go.set()
    assert second.expect("loaded").body["mode"] == "copied"
    one, two = first.worker(), second.worker()
    assert one.tensors() == two.tensors() == reference(first.model)
    assert emulator.used_of(1) >= one.client.weights.size  # type: ignore[union-attr]
    copies = emulator.calls["cuMemcpyHtoDAsync"]
    assert emulator.calls["cuMemcpyDtoDAsync"] > 0
    assert copies > 0


def test_the_kv_of_a_request_follows_it(
    pair: Callable[[], tuple[Served, Served]], emulator: Emulator
) -> None:
    first, second = pair()
    one, two = first.worker(), second.worker()
    one.client.wait_arenas()
    two.client.wait_arenas()
    for served in (first, second):
        served.owner.send({"type": "open", "request": "r"})
    written(one, "r", 3)
    emulator.delay = 0.002
    blocks = two.client.bring("r", 1, 4, 3)
    assert blocks is not None
    assert (len(blocks.blocks), blocks.reused) == (4, 0)
    assert [got(two, block) for block in blocks.blocks[:3]] == [content(n) for n in range(3)]
    # Nobody has it over there any more.
    until(lambda: usage(first) == 0)
    assert usage(second) == 4
    two.client.finish("r")
    until(lambda: usage(second) == 0)


def usage(served: Served) -> int:
    served.order("usage")
    used: int = served.expect("usage").body["kv_used"]
    return used


def test_what_is_there_already_is_not_brought_again(
    pair: Callable[[], tuple[Served, Served]], emulator: Emulator
) -> None:
    first, second = pair()
    one, two = first.worker(), second.worker()
    one.client.wait_arenas()
    two.client.wait_arenas()
    for request in ("r", "s"):
        for served in (first, second):
            served.owner.send({"type": "open", "request": request})
    written(one, "r", 2)
    brought = two.client.bring("r", 1, 2, 2)
    assert brought is not None
    two.client.publish("r", ["k0"])
    two.client.finish("r")
    written(one, "s", 2)
    for block in brought.blocks[:1]:
        put(two, block, b"\xee" * BLOCK)  # as it is here, whatever it is over there
    again = two.client.bring("s", 1, 2, 2, ["k0"])
    assert again is not None
    assert again.reused == 1
    assert [got(two, block) for block in again.blocks] == [b"\xee" * BLOCK, content(1)]


def test_kv_that_is_lost_is_not_brought(pair: Callable[[], tuple[Served, Served]]) -> None:
    first, second = pair()
    one, two = first.worker(), second.worker()
    one.client.wait_arenas()
    two.client.wait_arenas()
    second.owner.send({"type": "open", "request": "r"})
    until(lambda: two.client.bring("r", 0, 2, 2) is None and two.client.may_assign)
    assert usage(second) == 0
    found = two.client.assign("r", 1, 2)  # to compute it again
    assert found is not None


def test_more_than_there_is_waits(pair: Callable[[], tuple[Served, Served]]) -> None:
    first, second = pair()
    one, two = first.worker(), second.worker()
    one.client.wait_arenas()
    two.client.wait_arenas()
    for request in ("r", "s"):
        for served in (first, second):
            served.owner.send({"type": "open", "request": request})
    written(one, "r", 2)
    until(lambda: two.client.assign("s", 0, 3) is not None)
    assert two.client.bring("r", 1, 2, 2) is None
    assert not two.client.may_assign
    two.client.finish("s")
    until(lambda: two.client.may_assign)
    blocks = two.client.bring("r", 1, 2, 2)
    assert blocks is not None
    assert [got(two, block) for block in blocks.blocks] == [content(0), content(1)]


def test_a_worker_that_dies_meanwhile_keeps_its_blocks_until_they_are_written(
    pair: Callable[[], tuple[Served, Served]], emulator: Emulator
) -> None:
    first, second = pair()
    one, two, three = first.worker(), second.worker(), second.worker()
    for worker in (one, two, three):
        worker.client.wait_arenas()
    second.expect("loaded")
    for served in (first, second):
        served.owner.send({"type": "open", "request": "r"})
    second.owner.send({"type": "open", "request": "s"})
    written(one, "r", 4)
    before = emulator.calls["cuMemcpyDtoDAsync"]
    emulator.hold()
    two.client._link.send(
        {"type": "bring", "request": "r", "attempt": 1, "count": 4, "written": 4, "keys": []}
    )
    until(lambda: emulator.calls["cuMemcpyDtoDAsync"] > before)
    second.workers.remove(two)
    two.close()
    assert three.client.assign("s", 0, 1) is None
    second.owner.send({"type": "release", "request": "r"})
    assert three.client.assign("s", 0, 1) is None  # it is still written to
    emulator.go.set()
    until(lambda: three.client.assign("s", 0, 1) is not None)


def test_weights_leave_both_and_come_back(
    pair: Callable[[], tuple[Served, Served]], emulator: Emulator
) -> None:
    first, second = pair()
    one, two = first.worker(), second.worker()
    expected = reference(first.model)
    assert one.tensors() == two.tensors() == expected
    second.expect("loaded")
    for served, worker in ((second, two), (first, one)):
        served.order("park")
        worker.let_go()
        assert served.hear("parked") is None
    for served in (first, second):
        served.order("wake")
        assert served.hear("woken") is None
    assert one.tensors() == two.tensors() == expected


def test_gpus_that_do_not_reach_each_other(
    pair: Callable[[], tuple[Served, Served]], emulator: Emulator
) -> None:
    emulator.can_reach = False
    _, second = pair()
    error = ColdframeError.from_wire(second.expect("failed").body["error"])
    assert isinstance(error, ArenaError)
    assert "CUDA_ERROR_INVALID_DEVICE" in str(error)
    assert "reach each other's memory" in str(error)


def test_no_room_on_the_second(
    pair: Callable[[], tuple[Served, Served]], emulator: Emulator
) -> None:
    device = CudaDevice(1, emulator)
    other = device.arena("weights", device.available(), now=True)
    first, second = pair()
    error = ColdframeError.from_wire(second.expect("failed").body["error"])
    assert isinstance(error, DeviceFull)
    assert "cuda:1" in str(error)
    assert first.expect("failed", "loaded").kind == "loaded"
    other.close()
    device.close()


def test_the_end_of_the_first_is_the_end_of_the_second(
    pair: Callable[[], tuple[Served, Served]],
) -> None:
    first, second = pair()
    second.expect("loaded")
    first.owner.close()
    error = ColdframeError.from_wire(second.expect("failed").body["error"])
    assert isinstance(error, MemoryServiceGone)


def test_segments_are_of_the_second_gpu(pair: Callable[[], tuple[Served, Served]]) -> None:
    _, second = pair()
    second.expect("loaded")
    load = second.service._weights.load
    assert load is not None
    (segment,) = load.weights.segments
    assert isinstance(segment, Segment)
    assert not segment.writable


@pytest.mark.parametrize("what", ["weights", "kv"])
def test_whatever_breaks_a_copy_is_told(
    pair: Callable[[], tuple[Served, Served]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    if what == "weights":
        monkeypatch.setattr(DeviceArena, "take", broken)
    first, second = pair()
    if what == "kv":
        one, two = first.worker(), second.worker()
        one.client.wait_arenas()
        two.client.wait_arenas()
        second.expect("loaded")
        for served in (first, second):
            served.owner.send({"type": "open", "request": "r"})
        written(one, "r", 1)
        monkeypatch.setattr(DeviceArena, "take", broken)
        with suppress(ReplicaError):  # it may hear of the failure first
            assert two.client.bring("r", 1, 1, 1) is None
    error = ColdframeError.from_wire(second.expect("failed").body["error"])
    assert isinstance(error, ReplicaError)
    assert error.got == "ZeroDivisionError()"
