"""Weights parked in locked host memory: nothing is lost, nothing is left, nothing is told early.

What is shown is the protocol, on an emulated driver; no test says how fast any of it is.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.loader.arena import HUGE_PAGE
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.locked import LockedMemory
from coldframe.loader.devices.parked import StayingWeights, stretches_of
from coldframe.loader.devices.pinned import PinnedWeights
from coldframe.loader.errors import ArenaError, DeviceError, DeviceFull, DeviceLost
from coldframe.loader.wire import Channel
from tests.loader.devices.emulator import GRANULARITY, Emulator
from tests.loader.weights import layered

PATIENCE_S = 60.0
BASE = 0x5200_0000_0000
PIECE = HUGE_PAGE
SIZE = 4 * GRANULARITY
MIB = 1 << 20
STAGES = [
    [],  # a stage may have no bytes, the first too
    [(0, 300_000)],
    [(300_032, 5 * MIB)],  # over several pieces
    [],
    [(300_032 + 5 * MIB, 64), (7 * MIB, 4096)],
    [(7 * MIB + 8192, MIB - 8192)],
    [],
]
USED = [stretch for stages in STAGES for stretch in stages]
ROOMY = 64 << 30


class Stop(Exception):
    """What a check raises."""


@pytest.fixture
def arena(gpu: Context) -> Iterator[DeviceArena]:
    arena = DeviceArena(gpu, SIZE, BASE, writable=False)
    arena.grow(SIZE)
    ctypes.memmove(BASE, CONTENT, SIZE)
    yield arena
    arena.close()


CONTENT = random.Random(7).randbytes(SIZE)


@pytest.fixture
def weights(arena: DeviceArena) -> Iterator[PinnedWeights]:
    weights = pinned(arena)
    yield weights
    weights.close()


def pinned(arena: DeviceArena, **more: object) -> PinnedWeights:
    return PinnedWeights(arena, STAGES, piece=PIECE, available=lambda: ROOMY, **more)  # type: ignore[arg-type]


def is_back() -> bool:
    """Whether the stages' bytes are where they were."""
    return all(
        ctypes.string_at(BASE + offset, length) == CONTENT[offset : offset + length]
        for offset, length in USED
    )


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Runs it beside the test, and keeps what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("streams", [1, 2])
def test_they_leave_and_come_back_where_they_were(
    emulator: Emulator, arena: DeviceArena, streams: int
) -> None:
    weights = pinned(arena, streams=streams)
    told: list[int] = []
    for _ in range(3):
        weights.keep()
        assert weights.kept
        assert is_back()  # it is a copy
        assert weights.note == "in locked memory"
        weights.leave()
        assert emulator.used == arena.grown == 0
        assert weights.segments == []
        assert weights.view(0, SIZE) == CONTENT
        weights.come_back()
        assert (arena.address, arena.grown) == (BASE, SIZE)
        assert not is_back()
        told.clear()
        weights.bring(told.append)
        assert told == list(range(len(STAGES)))
        assert is_back()
    # They do not change, so they were copied out once.
    assert emulator.calls["cuMemcpyDtoHAsync"] == SIZE // PIECE
    assert emulator.calls["cuMemHostRegister"] == SIZE // PIECE
    assert emulator.most_locked == SIZE
    weights.close()


def test_copies_are_few_and_large(emulator: Emulator, weights: PinnedWeights) -> None:
    weights.keep()
    before = emulator.calls["cuMemcpyHtoDAsync"]
    weights.bring(lambda stage: None)
    # Five stretches, one of which reaches over three pieces.
    assert emulator.calls["cuMemcpyHtoDAsync"] - before == 7
    assert emulator.calls["cuMemcpy2DAsync"] == 0


def test_a_stage_is_told_when_its_last_byte_is_in(
    emulator: Emulator, arena: DeviceArena, weights: PinnedWeights
) -> None:
    emulator.delay = 0.001
    weights.keep()
    weights.leave()
    weights.come_back()
    wrong: list[int] = []

    def arrived(stage: int) -> None:
        for offset, length in STAGES[stage]:
            if ctypes.string_at(BASE + offset, length) != CONTENT[offset : offset + length]:
                wrong.append(stage)

    weights.bring(arrived)
    assert wrong == []


def test_nothing_is_told_before_its_copy_has_landed(
    emulator: Emulator, weights: PinnedWeights
) -> None:
    weights.keep()
    weights.leave()
    weights.come_back()
    told: list[int] = []
    emulator.hold()
    thread, raised = in_thread(lambda: weights.bring(told.append))
    eventually(lambda: emulator.calls["cuEventSynchronize"] > SIZE // PIECE)
    assert told == [0]  # which has no bytes
    assert not is_back()
    emulator.go.set()
    thread.join(PATIENCE_S)
    assert raised == []
    assert told == list(range(len(STAGES)))
    assert is_back()


def test_they_are_kept_only_when_the_last_copy_has_landed(
    emulator: Emulator, weights: PinnedWeights
) -> None:
    emulator.hold()
    thread, _ = in_thread(weights.keep)
    eventually(lambda: emulator.calls["cuEventSynchronize"] == 1)
    # Each piece was locked, and its copy asked for, without waiting for the one before.
    assert emulator.calls["cuMemcpyDtoHAsync"] == SIZE // PIECE
    assert not weights.kept
    with pytest.raises(ArenaError, match="not parked"):
        weights.leave()
    emulator.go.set()
    thread.join(PATIENCE_S)
    assert weights.kept


def test_no_more_copies_are_under_way_than_can_soon_be_cancelled(
    emulator: Emulator, gpu: Context
) -> None:
    arena = DeviceArena(gpu, 40 * GRANULARITY, writable=False)
    arena.grow(arena.size)
    weights = PinnedWeights(arena, [[(0, arena.size)]], piece=PIECE, available=lambda: ROOMY)
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stop

    emulator.hold()
    thread, raised = in_thread(lambda: weights.keep(check))
    eventually(lambda: emulator.calls["cuEventSynchronize"] == 1)
    assert emulator.calls["cuMemcpyDtoHAsync"] == 16
    stop.set()
    emulator.go.set()
    thread.join(PATIENCE_S)
    assert [type(error) for error in raised] == [Stop]
    assert emulator.calls["cuMemcpyDtoHAsync"] < 20
    assert not weights.kept
    assert not emulator._registered
    weights.keep()
    weights.close()
    arena.close()


@pytest.mark.parametrize("after", range(0, 12, 2))
def test_a_return_that_is_cancelled_can_be_had_again(
    emulator: Emulator, weights: PinnedWeights, after: int
) -> None:
    weights.keep()
    weights.leave()
    weights.come_back()
    looks = iter(range(100))

    def check() -> None:
        if next(looks) == after:
            raise Stop

    with pytest.raises(Stop):
        weights.bring(lambda stage: None, check)
    # Nothing is under way: what is unmapped now would be the loss of the device.
    weights.leave()
    weights.come_back()
    weights.bring(lambda stage: None)
    assert is_back()


KEEP = [
    "cuCtxSetCurrent",
    "cuStreamCreate",
    "cuEventCreate",
    "cuMemcpyDtoHAsync",
    "cuEventRecord",
    "cuEventSynchronize",
]


@pytest.mark.parametrize("call", KEEP)
@pytest.mark.parametrize("nth", [1, 3])
def test_what_fails_while_they_are_kept_leaves_them_where_they_are(
    emulator: Emulator, weights: PinnedWeights, call: str, nth: int
) -> None:
    if nth > 1 and call in ("cuCtxSetCurrent", "cuStreamCreate"):
        nth = 1
    emulator.fail(call, nth)
    with pytest.raises(DeviceError, match=call):
        weights.keep()
    assert not weights.kept
    assert not emulator._registered
    assert is_back()
    weights.keep()
    assert weights.kept


BRING = ["cuCtxSetCurrent", "cuMemcpyHtoDAsync", "cuEventRecord", "cuEventSynchronize"]


@pytest.mark.parametrize("call", BRING)
@pytest.mark.parametrize("nth", [1, 3])
def test_what_fails_while_they_come_back_loses_nothing(
    emulator: Emulator, weights: PinnedWeights, call: str, nth: int
) -> None:
    weights.keep()
    weights.leave()
    weights.come_back()
    told: list[int] = []
    emulator.fail(call, 1 if call == "cuCtxSetCurrent" else nth)
    with pytest.raises(DeviceError, match=call):
        weights.bring(told.append)
    assert told == sorted(told)
    assert len(told) < len(STAGES)
    weights.leave()
    weights.come_back()
    weights.bring(lambda stage: None)
    assert is_back()


def test_what_cannot_be_given_back_at_first_is_given_back_before_they_return(
    emulator: Emulator, arena: DeviceArena, weights: PinnedWeights
) -> None:
    weights.keep()
    emulator.fail("cuMemUnmap")
    with pytest.raises(DeviceError, match="cannot be unmapped"):
        weights.leave()
    assert weights.kept
    weights.come_back()
    weights.bring(lambda stage: None)
    assert is_back()
    assert emulator.used == SIZE


def test_memory_that_others_have_now_is_waited_for(
    emulator: Emulator, gpu: Context, arena: DeviceArena, weights: PinnedWeights
) -> None:
    weights.keep()
    weights.leave()
    other = DeviceArena(gpu, emulator.memory - SIZE + GRANULARITY, writable=True)
    other.grow(other.size)
    for _ in range(2):
        with pytest.raises(DeviceFull, match="OUT_OF_MEMORY"):
            weights.come_back()
        assert arena.grown == 0
        assert weights.kept
    other.close()
    weights.come_back()
    weights.bring(lambda stage: None)
    assert is_back()


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_what_cannot_be_locked_is_copied_all_the_same(
    emulator: Emulator, weights: PinnedWeights, nth: int
) -> None:
    emulator.fail("cuMemHostRegister", nth, "CUDA_ERROR_OPERATING_SYSTEM")
    weights.keep()
    assert emulator.calls["cuMemHostRegister"] == nth  # it is not asked again
    locked = f"but for {(nth - 1) * PIECE:,} of {SIZE:,} bytes: CUDA_ERROR_OPERATING_SYSTEM"
    assert locked in weights.note
    weights.leave()
    weights.come_back()
    weights.bring(lambda stage: None)
    assert is_back()


def test_without_host_memory_they_stay(emulator: Emulator, arena: DeviceArena) -> None:
    weights = PinnedWeights(arena, STAGES, piece=PIECE, available=lambda: SIZE)
    with pytest.raises(DeviceFull, match="no host memory to park the weights in"):
        weights.keep()
    assert is_back()
    weights.close()


def test_host_memory_that_runs_short_half_way_is_given_back(
    emulator: Emulator, arena: DeviceArena
) -> None:
    left = iter([ROOMY, ROOMY, ROOMY, 300 << 20, 0])
    weights = PinnedWeights(arena, STAGES, piece=PIECE, available=lambda: next(left))
    with pytest.raises(DeviceFull, match=r"expected 2,097,152 bytes more, got 0 bytes"):
        weights.keep()
    assert emulator.calls["cuMemHostRegister"] == 3
    assert not emulator._registered
    weights.close()


def test_addresses_that_are_not_to_be_had_are_no_memory(gpu: Context) -> None:
    with pytest.raises(DeviceFull, match="limit on address space"):
        LockedMemory(1 << 50, available=lambda: 1 << 60)


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("way", ["out", "in"])
def test_a_device_lost_on_the_way_is_told_and_closes(
    emulator: Emulator, arena: DeviceArena, weights: PinnedWeights, way: str, nth: int
) -> None:
    told: list[int] = []
    if way == "out":
        emulator.fail_copy(nth)
        with pytest.raises(DeviceLost, match="ILLEGAL_ADDRESS"):
            weights.keep()
        assert not weights.kept
    else:
        weights.keep()
        weights.leave()
        weights.come_back()
        emulator.fail_copy(nth)
        with pytest.raises(DeviceLost, match="ILLEGAL_ADDRESS"):
            weights.bring(told.append)
        assert len(told) <= nth
    weights.close()
    weights.close()


def test_a_device_that_is_lost_while_it_waits_is_told(
    emulator: Emulator, weights: PinnedWeights
) -> None:
    weights.keep()
    emulator.hold()
    thread, raised = in_thread(lambda: weights.bring(lambda stage: None))
    eventually(lambda: emulator.calls["cuEventSynchronize"] > SIZE // PIECE)
    emulator.lose()
    thread.join(PATIENCE_S)
    assert [type(error) for error in raised] == [DeviceLost]


def test_who_has_not_kept_them_has_nothing_to_bring(weights: PinnedWeights) -> None:
    for wrong in (lambda: weights.bring(lambda stage: None), lambda: weights.view(0, 1)):
        with pytest.raises(ArenaError, match="not parked"):
            wrong()


def test_what_is_forgotten_is_kept_anew(emulator: Emulator, weights: PinnedWeights) -> None:
    weights.keep()
    weights.forget()
    assert not emulator._registered
    assert weights.note == "not kept"
    weights.keep()
    weights.leave()
    weights.come_back()
    weights.bring(lambda stage: None)
    assert is_back()


def test_host_memory_is_aligned_and_no_concern_of_children(gpu: Context) -> None:
    memory = LockedMemory(3 * PIECE - 5, PIECE, lambda: ROOMY)
    gpu.bind()
    for index in range(3):
        memory.prepare(gpu.driver, index)
        memory.prepare(gpu.driver, index)
    assert memory.address % HUGE_PAGE == 0
    assert memory.locked == 3 * PIECE - 5
    memory.view(0, 3)[:] = b"abc"
    assert ctypes.string_at(memory.address, 3) == b"abc"
    flags = _flags_at(memory.address)
    assert {"dc", "hg"} <= flags
    memory.close(gpu.driver)


def _flags_at(address: int) -> set[str]:
    """What the kernel says of the mapping at an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(part, 16) for part in words[0].split("-"))
            here = begin <= address < end
        elif here and words[0] == "VmFlags:":
            return set(words[1:])
    raise AssertionError("not mapped")


def test_weights_that_stay_are_all_there() -> None:
    weights = StayingWeights(3)
    told: list[int] = []
    weights.keep(lambda: None)
    weights.leave()
    weights.come_back()
    weights.bring(told.append, lambda: None)
    weights.close()
    assert told == [0, 1, 2]
    assert weights.kept
    assert not weights.leaves


@pytest.mark.parametrize("layout", list(Layout))
def test_stretches_are_those_of_the_plan(tmp_path: Path, layout: Layout) -> None:
    plan = Plan.build(Checkpoint.open(layered(tmp_path / "model")), layout=layout)
    stages = stretches_of(plan)
    assert len(stages) == len(plan.stages)
    for placement in plan.placements.values():
        begin, end = placement.arena_offset, placement.arena_offset + placement.nbytes
        found = stages[placement.stage]
        assert begin == end or any(at <= begin and end <= at + length for at, length in found)
    for stretches in stages:
        for (at, length), (following, _) in itertools.pairwise(stretches):
            assert at + length < following
    if layout is Layout.ALIGNED:
        # There a stage is one stretch, since tensors lie in the order of use.
        assert all(len(stretches) == 1 for stretches in stages)


OTHER = """
import ctypes, os, sys
from coldframe.loader.arena import Segment
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.wire import Channel
from tests.loader.devices.emulator import Emulator

channel = Channel.from_fd(int(sys.argv[1]))
emulator = Emulator()
gpu = Context(Driver.open(emulator), 0)
arena = DeviceReservation(gpu, int(sys.argv[2]), int(sys.argv[3]), exact=True)
while (message := channel.recv()) is not None:
    body = message.body
    if message.kind == "attach":
        arena.attach([Segment.from_wire(message.fds[0], body["segment"])])
        os.close(message.fds[0])
    elif message.kind == "detach":
        arena.detach()
    data = b"" if not emulator.used else ctypes.string_at(arena.address + body["at"], body["count"])
    channel.send({"type": "done", "used": emulator.used, "data": data.hex()})
arena.close()
gpu.close()
left = emulator.left()
emulator.close()
sys.exit(str(left) if left else 0)
"""


def test_another_process_finds_them_at_the_same_address_again(
    emulator: Emulator, gpu: Context, arena: DeviceArena, weights: PinnedWeights
) -> None:
    ours, theirs = socket.socketpair()
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(theirs.fileno()), str(SIZE), str(BASE)],
        pass_fds=[theirs.fileno()],
        cwd=Path(__file__).parents[3],
    )
    theirs.close()
    channel = Channel(ours)
    at, count = 3 * MIB, 100

    def ask(kind: str, *fds: int, **body: object) -> tuple[int, bytes]:
        channel.send({"type": kind, "at": at, "count": count, **body}, fds)
        answer = channel.recv()
        assert answer is not None
        return answer.body["used"], bytes.fromhex(answer.body["data"])

    def attach() -> tuple[int, bytes]:
        (segment,) = weights.segments
        return ask("attach", segment.fd, segment=segment.to_wire())

    try:
        assert attach() == (SIZE, CONTENT[at : at + count])
        weights.keep()
        assert ask("detach") == (0, b"")
        weights.leave()
        assert emulator.used == 0
        weights.come_back()
        assert attach()[1] != CONTENT[at : at + count]
        weights.bring(lambda stage: None)
        assert ask("look") == (SIZE, CONTENT[at : at + count])
    finally:
        channel.close()
        assert other.wait(60) == 0
    assert os.getpid() != other.pid
