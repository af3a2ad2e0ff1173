"""Arenas in a GPU's memory, here and in another process."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from coldframe.loader.arena import Segment
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ArenaError, DeviceError, DeviceFull, DeviceLost
from coldframe.loader.wire import Channel
from tests.loader.devices.emulator import GRANULARITY, Emulator, descriptors

BASE = 0x5100_0000_0000
MIB = 1 << 20


@pytest.fixture
def arena(gpu: Context) -> Iterator[DeviceArena]:
    """Eight steps of addresses, nothing behind them yet."""
    arena = DeviceArena(gpu, 8 * GRANULARITY, BASE, writable=True, zeroed=True)
    yield arena
    arena.close()


def write(gpu: Context, address: int, data: bytes) -> None:
    gpu.bind()
    stream = gpu.driver.stream()
    host = ctypes.create_string_buffer(data, len(data))
    try:
        gpu.driver.copy_in(address, ctypes.addressof(host), len(data), stream)
        gpu.driver.synchronize(stream)
    finally:
        with suppress(DeviceLost):
            gpu.driver.destroy_stream(stream)


def test_it_is_reserved_in_full_and_grows_in_steps(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    assert (arena.address, arena.size, arena.grown) == (BASE, 8 * GRANULARITY, 0)
    assert emulator.used == 0
    first = arena.grow(1)
    second = arena.grow(3 * MIB)
    assert (first.offset, first.length) == (0, GRANULARITY)
    assert (second.offset, second.length) == (GRANULARITY, 2 * GRANULARITY)
    assert arena.segments == [first, second]
    assert arena.grown == emulator.used == 3 * GRANULARITY
    assert gpu.available() == emulator.memory - 3 * GRANULARITY
    write(gpu, BASE + GRANULARITY - 3, b"across")
    assert ctypes.string_at(BASE + GRANULARITY - 3, 6) == b"across"
    assert not emulator._handles  # a mapping and a descriptor hold it


@pytest.mark.parametrize("ordinal", [0, 1])
def test_it_says_on_which_gpu_it_is(ordinal: int) -> None:
    emulator = Emulator(devices=2)
    context = Context(Driver.open(emulator), ordinal)
    reservation = DeviceReservation(context, GRANULARITY)
    assert reservation.dlpack_device == (2, ordinal)
    reservation.close()
    context.close()
    emulator.close()


def test_the_last_step_is_what_is_left(arena: DeviceArena) -> None:
    arena.grow(7 * GRANULARITY)
    assert arena.grow(5 * GRANULARITY).length == GRANULARITY
    with pytest.raises(ArenaError, match="cannot grow, in cuda:0, expected 1 to 0 bytes"):
        arena.grow(1)


def test_new_memory_is_zeroed_where_that_is_asked_for(emulator: Emulator, gpu: Context) -> None:
    kv = DeviceArena(gpu, GRANULARITY, writable=True, zeroed=True)
    weights = DeviceArena(gpu, GRANULARITY, writable=False)
    weights.grow(GRANULARITY)
    kv.grow(GRANULARITY)
    # Who has never been promised zeros does not find any.
    assert ctypes.string_at(weights.address, 4) != bytes(4)
    assert ctypes.string_at(kv.address, 4) == bytes(4)
    kv.close()
    weights.close()


def test_a_taken_address_is_an_error_or_another(gpu: Context, arena: DeviceArena) -> None:
    with pytest.raises(ArenaError) as caught:
        DeviceReservation(gpu, GRANULARITY, BASE, exact=True)
    assert caught.value.expected == hex(BASE)
    other = DeviceReservation(gpu, GRANULARITY, BASE)
    assert other.address not in (0, BASE)
    assert other.address % GRANULARITY == 0
    other.close()
    other.close()


def test_it_is_attached_beside_itself_and_read_only(gpu: Context, arena: DeviceArena) -> None:
    arena.grow(GRANULARITY)
    arena.grow(2 * GRANULARITY)
    write(gpu, BASE + GRANULARITY, b"weights")
    view = DeviceReservation(gpu, arena.size)
    view.attach([Segment(s.fd, 0, s.length, s.offset, False) for s in arena.segments])
    assert view.read_only
    assert ctypes.string_at(view.address + GRANULARITY, 7) == b"weights"
    write(gpu, BASE + GRANULARITY, b"changed")
    assert ctypes.string_at(view.address + GRANULARITY, 7) == b"changed"
    view.close()


def test_what_is_attached_for_reading_cannot_be_written(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    arena.grow(GRANULARITY)
    view = DeviceReservation(gpu, arena.size)
    view.attach([Segment(arena.segments[0].fd, 0, GRANULARITY, 0, False)])
    with pytest.raises(DeviceLost):
        write(gpu, view.address, b"x")
    view.close()  # a lost device is no error any more


def test_a_driver_that_cannot_protect_maps_all_the_same(emulator: Emulator, gpu: Context) -> None:
    emulator.can_protect = False
    arena = DeviceArena(gpu, GRANULARITY, writable=False)
    arena.grow(GRANULARITY)
    view = DeviceReservation(gpu, GRANULARITY)
    view.attach(arena.segments)
    assert not view.read_only
    view.close()
    arena.close()


def test_let_go_for_a_checkpoint_and_mapped_again_at_the_same_place(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    arena.grow(GRANULARITY)
    arena.grow(GRANULARITY)
    worker = DeviceReservation(gpu, arena.size)
    worker.attach(arena.segments)
    write(gpu, worker.address + 5, b"kept")
    worker.detach()
    assert len(emulator._mapped) == 2
    assert not emulator._handles
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        write(gpu, worker.address, b"nothing there")
    worker.attach(arena.segments)
    assert ctypes.string_at(worker.address + 5, 4) == b"kept"

    arena.detach()
    worker.detach()
    assert not emulator._mapped
    arena.attach()
    assert ctypes.string_at(BASE + 5, 4) == b"kept"
    with pytest.raises(ArenaError, match="there is a segment already"):
        arena.attach()
    worker.close()


def test_memory_is_given_back_and_grown_again(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    for _ in range(3):
        arena.grow(GRANULARITY)
    write(gpu, BASE + 2 * GRANULARITY, b"gone")
    gone = arena.shrink(GRANULARITY + 1)
    assert [segment.offset for segment in gone] == [2 * GRANULARITY]
    assert arena.grown == emulator.used == 2 * GRANULARITY
    arena.grow(GRANULARITY)
    assert ctypes.string_at(BASE + 2 * GRANULARITY, 4) == bytes(4)
    arena.shrink()
    assert arena.grown == emulator.used == 0
    assert arena.address == BASE
    assert arena.grow(GRANULARITY).offset == 0


def test_what_cannot_be_unmapped_is_told_and_tried_again(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    for _ in range(3):
        arena.grow(GRANULARITY)
    view = DeviceReservation(gpu, arena.size)
    view.attach(arena.segments)
    emulator.fail("cuMemUnmap", nth=2)
    with pytest.raises(DeviceError, match="cannot be unmapped"):
        view.detach()
    assert len(emulator._mapped) == 3 + 1
    view.detach()
    assert len(emulator._mapped) == 3
    emulator.fail("cuMemUnmap")
    with pytest.raises(DeviceError, match="cannot be unmapped"):
        arena.shrink(GRANULARITY)
    assert arena.shrink(GRANULARITY) == []
    assert emulator.used == GRANULARITY
    view.close()


def test_more_than_there_is_leaves_the_arena_as_it_was(emulator: Emulator, gpu: Context) -> None:
    arena = DeviceArena(gpu, 4 << 30, writable=True)
    arena.grow(600 * MIB)
    with pytest.raises(DeviceFull, match="OUT_OF_MEMORY"):
        arena.grow(600 * MIB)
    assert arena.grown == emulator.used == 600 * MIB
    arena.grow(400 * MIB)
    arena.close()


STEPS = {
    "grow": [
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemMap",
        "cuMemSetAccess",
        "cuStreamCreate",
        "cuMemsetD8Async",
        "cuStreamSynchronize",
    ],
    "attach": ["cuMemImportFromShareableHandle", "cuMemMap", "cuMemSetAccess"],
}


@pytest.mark.parametrize(
    ("operation", "call"), [(name, call) for name, calls in STEPS.items() for call in calls]
)
@pytest.mark.parametrize("code", ["CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_NOT_SUPPORTED"])
def test_what_fails_half_way_leaves_nothing_behind(
    emulator: Emulator, gpu: Context, operation: str, call: str, code: str
) -> None:
    arena = DeviceArena(gpu, 4 * GRANULARITY, writable=True, zeroed=True)
    for _ in range(2):
        arena.grow(GRANULARITY)
    view = DeviceReservation(gpu, arena.size)
    mapped, used = dict(emulator._mapped), emulator.used
    # The second of two segments, so that the first has to be taken back.
    emulator.fail(call, nth=2 if operation == "attach" else 1, code=code)
    work = {
        "grow": lambda: arena.grow(GRANULARITY),
        "attach": lambda: view.attach(arena.segments),
    }
    with pytest.raises((DeviceError, ArenaError), match=code):
        work[operation]()
    assert emulator._mapped == mapped
    assert emulator.used == used
    assert not emulator._handles
    assert not emulator._streams
    # And it works the next time.
    arena.grow(GRANULARITY)
    view.attach(arena.segments)
    view.close()
    arena.close()


@pytest.mark.parametrize("call", [*STEPS["grow"], "cuMemRelease"])
def test_a_device_lost_in_mid_growth_is_told_and_closes(
    emulator: Emulator, gpu: Context, call: str
) -> None:
    arena = DeviceArena(gpu, 4 * GRANULARITY, writable=True, zeroed=True)
    arena.grow(GRANULARITY)
    plain = getattr(emulator, call)

    def lost(*arguments: object) -> object:
        emulator.lose()
        return plain(*arguments)

    setattr(emulator, call, lost)
    before = len(descriptors())
    with pytest.raises(DeviceLost) if call != "cuMemRelease" else nullcontext():
        arena.grow(GRANULARITY)
    with pytest.raises(DeviceLost, match=r"ECC_UNCORRECTABLE.*dmesg"):
        arena.grow(GRANULARITY)
    # The emulator cannot let go of the new memory any more, but nobody else has it.
    kept = 0 if call == "cuMemCreate" else 1
    grown = 1 if call == "cuMemRelease" else 0
    assert len(descriptors()) == before + kept + grown
    arena.close()
    assert len(descriptors()) == before - 1 + kept


@pytest.mark.parametrize("kind", ["file", "socket", "memfd", "closed", "negative"])
def test_a_descriptor_that_is_no_arena_is_refused(gpu: Context, kind: str) -> None:
    view = DeviceReservation(gpu, GRANULARITY)
    with tempfile.TemporaryFile() as file, socket.socket() as sock:
        memfd = os.memfd_create("other")
        fd = {
            "file": file.fileno(),
            "socket": sock.fileno(),
            "memfd": memfd,
            "closed": memfd,
            "negative": -1,
        }[kind]
        if kind != "memfd":
            os.close(memfd)
        with pytest.raises(ArenaError, match=r"not one of a GPU's memory.*CUDA_ERROR_INVALID"):
            view.attach([Segment(fd, 0, GRANULARITY, 0, False)])
        if kind == "memfd":
            os.close(memfd)
    view.close()


@pytest.mark.parametrize(
    ("fd_offset", "length", "offset", "what"),
    [
        (0, GRANULARITY, 1, "does not fit"),
        (0, GRANULARITY, -GRANULARITY, "does not fit"),
        (0, GRANULARITY + 1, 0, "does not fit"),
        (0, 0, 0, "does not fit"),
        (0, 16 * GRANULARITY, 0, "does not fit"),
        (GRANULARITY, GRANULARITY, 0, "mapped from its start"),
        (0, 2 * GRANULARITY, 0, "CUDA_ERROR_INVALID_VALUE"),  # longer than what it is of
    ],
)
def test_a_segment_that_does_not_fit_is_refused(
    gpu: Context, arena: DeviceArena, fd_offset: int, length: int, offset: int, what: str
) -> None:
    segment = arena.grow(GRANULARITY)
    view = DeviceReservation(gpu, 8 * GRANULARITY)
    with pytest.raises(ArenaError, match=what):
        view.attach([Segment(segment.fd, fd_offset, length, offset, True)])
    view.attach([segment])
    with pytest.raises(ArenaError, match="there is a segment already"):
        view.attach([segment])
    view.close()


def test_memory_is_given_back_behind_those_who_look_at_it(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    arena.grow(2 * GRANULARITY)
    write(gpu, BASE + 5, b"seen")
    emulator.hold()
    seen = memoryview(bytearray(4))
    reader = threading.Thread(target=lambda: arena.read(5, seen))
    reader.start()
    while not emulator.calls["cuMemcpyDtoHAsync"]:
        time.sleep(0.001)
    shrinking = threading.Thread(target=arena.shrink)
    shrinking.start()
    while arena.grown:
        time.sleep(0.001)
    # Who comes now finds nothing; who was there before is waited for.
    with pytest.raises(ArenaError, match="no such memory"):
        arena.read(5, memoryview(bytearray(4)))
    assert emulator.calls["cuMemUnmap"] == 0
    emulator.go.set()
    reader.join(60)
    shrinking.join(60)
    assert bytes(seen) == b"seen"
    assert emulator.calls["cuMemUnmap"] == 1


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
    if message.kind == "step":
        arena.attach([Segment.from_wire(message.fds[0], message.body["segment"])])
        os.close(message.fds[0])
        channel.send({"type": "attached"})
    elif message.kind == "read":
        data = ctypes.string_at(arena.address + message.body["at"], message.body["count"])
        channel.send({"type": "data", "data": data.decode()})
    elif message.kind == "let go":
        arena.detach()
        channel.send({"type": "gone", "left": len(emulator._mapped) + len(emulator._handles)})
arena.close()
gpu.close()
left = emulator.left()
emulator.close()
sys.exit(str(left) if left else 0)
"""


def test_two_processes_share_an_arena_as_it_grows(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    ours, theirs = socket.socketpair()
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, str(theirs.fileno()), str(arena.size), str(BASE)],
        pass_fds=[theirs.fileno()],
        cwd=Path(__file__).parents[3],
    )
    theirs.close()
    channel = Channel(ours)

    def ask(body: dict[str, object], *fds: int) -> dict[str, object]:
        channel.send(body, fds)
        answer = channel.recv()
        assert answer is not None
        return answer.body

    try:
        for step in range(3):
            segment = arena.grow(GRANULARITY)
            assert ask({"type": "step", "segment": segment.to_wire()}, segment.fd)
            write(gpu, BASE + segment.offset + 7, f"step {step}".encode())
            # The same bytes at the same address.
            read = {"type": "read", "at": segment.offset + 7, "count": 6}
            assert ask(read)["data"] == f"step {step}"
        assert ask({"type": "let go"})["left"] == 0
        write(gpu, BASE + 7, b"while!")
        for segment in arena.segments:
            ask({"type": "step", "segment": segment.to_wire()}, segment.fd)
        assert ask({"type": "read", "at": 7, "count": 6})["data"] == "while!"
        # What the owner gives back lives on where it is mapped.
        arena.shrink()
        assert ask({"type": "read", "at": 7, "count": 6})["data"] == "while!"
    finally:
        channel.close()
        assert other.wait(60) == 0
