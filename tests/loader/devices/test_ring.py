"""The ring between readers and the device: bytes land, errors end it, nothing is touched too early.

What is shown is the protocol, on an emulated driver; no test says how fast any of it is.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.arena import PAGE
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.copies import Copy
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.ring import Ring
from coldframe.loader.devices.transfer import Transfer
from coldframe.loader.errors import ColdframeError, DeviceError, DeviceLost, ReplicaError
from tests.loader.devices.emulator import Emulator

PATIENCE_S = 60.0


class Arrivals:
    """What the ring has told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ColdframeError | None]] = []
        self.asked = 0
        self._changed = threading.Condition()

    def of(self, number: int) -> Callable[[ColdframeError | None], None]:
        def arrived(error: ColdframeError | None) -> None:
            with self._changed:
                self.told.append((number, error))
                self._changed.notify_all()

        return arrived

    def wait(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.told) >= count, PATIENCE_S)


@pytest.fixture
def ring(emulator: Emulator) -> Iterator[Ring]:
    ring = Ring(3, 2 * PAGE)
    yield ring
    emulator.go.set()
    ring.close()


@pytest.fixture
def arena(gpu: Context) -> Iterator[DeviceArena]:
    arena = DeviceArena(gpu, 4 << 20, writable=False, zeroed=True)
    arena.grow(4 << 20)
    yield arena
    arena.close()


def put(transfer: Transfer, data: bytes, address: int, arrived: Callable[..., None]) -> None:
    with transfer.slot() as slot:
        slot.view[: len(data)] = data
        slot.submit([Copy(address, 0, len(data))], arrived)


def flood(transfer: Transfer, address: int, arrivals: Arrivals) -> None:
    """Hands in more and more, until that raises."""
    while True:
        put(transfer, b"data", address, arrivals.of(arrivals.asked))
        arrivals.asked += 1


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Runs it beside the test, and keeps what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except ColdframeError as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("connected_first", [True, False])
def test_many_readers_and_late_copies(
    emulator: Emulator, gpu: Context, arena: DeviceArena, streams: int, connected_first: bool
) -> None:
    emulator.delay = 0.0005
    ring = Ring(4, PAGE)
    data = random.Random(7).randbytes(150 * 3000)
    arrivals, transfer = Arrivals(), ring.transfer()
    todo = iter(range(150))
    lock = threading.Lock()

    def read() -> None:
        while True:
            with lock:
                number = next(todo, None)
            if number is None:
                return
            part = data[number * 3000 : (number + 1) * 3000]

            def arrived(error: ColdframeError | None, number: int = number) -> None:
                # It is there when it is said to be, and not only soon.
                here = ctypes.string_at(arena.address + number * 3000, 3000)
                arrivals.of(number if here == data[number * 3000 :][:3000] else -1)(error)

            put(transfer, part, arena.address + number * 3000, arrived)

    if connected_first:
        ring.connect(gpu, streams=streams)
    threads = [in_thread(read) for _ in range(8)]
    if not connected_first:
        eventually(lambda: len(ring._queue) == 4)  # as many as there are buffers
        ring.connect(gpu, streams=streams)
    for thread, raised in threads:
        thread.join(PATIENCE_S)
        assert raised == []
    arrivals.wait(150)
    assert sorted(number for number, _ in arrivals.told) == list(range(150))
    assert all(error is None for _, error in arrivals.told)
    assert ctypes.string_at(arena.address, len(data)) == data
    assert emulator.most_locked == 4 * PAGE
    assert ring.note == "from locked memory"
    transfer.cancel()
    ring.close()


def test_what_is_read_before_the_device_is_up_waits_in_order(
    emulator: Emulator, gpu: Context, arena: DeviceArena, ring: Ring
) -> None:
    arrivals, transfer = Arrivals(), ring.transfer()
    for number in range(3):
        put(transfer, bytes([number]) * 8, arena.address + 8 * number, arrivals.of(number))
    late, raised = in_thread(lambda: put(transfer, b"\3" * 8, arena.address + 24, arrivals.of(3)))
    assert emulator.calls["cuMemHostRegister"] == 0
    assert arrivals.told == []
    ring.connect(gpu)
    late.join(PATIENCE_S)
    arrivals.wait(4)
    assert raised == []
    assert arrivals.told == [(number, None) for number in range(4)]
    assert ctypes.string_at(arena.address, 32) == b"".join(bytes([n]) * 8 for n in range(4))


def test_a_buffer_is_nobodys_before_its_event_has_passed(
    emulator: Emulator, gpu: Context, arena: DeviceArena, ring: Ring
) -> None:
    ring.connect(gpu)
    arrivals, transfer = Arrivals(), ring.transfer()
    emulator.hold()
    for number in range(3):
        put(transfer, b"first%d" % number, arena.address + 8 * number, arrivals.of(number))
    waiting, raised = in_thread(
        lambda: put(transfer, b"second", arena.address + 24, arrivals.of(3))
    )
    # Three are on their way, and the first of them is waited for.
    eventually(lambda: emulator.calls["cuEventRecord"] == 3)
    eventually(lambda: emulator.calls["cuEventSynchronize"] == 1)
    assert arrivals.told == []
    assert not ring._free
    assert waiting.is_alive()
    # Nobody looks again and again whether it has passed.
    calls = dict(emulator.calls)
    time.sleep(0.05)
    assert emulator.calls == calls
    emulator.go.set()
    waiting.join(PATIENCE_S)
    arrivals.wait(4)
    assert raised == []
    # The copies took the bytes late; a buffer that came back early would have other ones.
    for number in range(3):
        assert ctypes.string_at(arena.address + 8 * number, 6) == b"first%d" % number


def test_rows_go_in_one_call(
    emulator: Emulator, gpu: Context, arena: DeviceArena, ring: Ring
) -> None:
    ring.connect(gpu)
    arrivals, transfer = Arrivals(), ring.transfer()
    with transfer.slot() as slot:
        slot.view[:40] = bytes(range(40))
        slot.submit(
            [Copy(arena.address, 2, 4, count=3, stride=10), Copy(arena.address + 12, 36, 4)],
            arrivals.of(0),
        )
    arrivals.wait(1)
    rows = [2, 3, 4, 5, 12, 13, 14, 15, 22, 23, 24, 25, 36, 37, 38, 39]
    assert ctypes.string_at(arena.address, 16) == bytes(rows)
    assert (emulator.calls["cuMemcpy2DAsync"], emulator.calls["cuMemcpyHtoDAsync"]) == (1, 1)


def test_buffers_are_page_aligned_and_kept_locked_for_the_next_load(
    emulator: Emulator, gpu: Context, arena: DeviceArena, ring: Ring
) -> None:
    ring.connect(gpu)
    for _ in range(3):
        arrivals, transfer = Arrivals(), ring.transfer()
        for number in range(10):
            with transfer.slot() as slot:
                address = ctypes.addressof(ctypes.c_char.from_buffer(slot.view))
                assert address % PAGE == 0
                assert len(slot.view) == 2 * PAGE
                slot.submit([Copy(arena.address, 0, 2 * PAGE)], arrivals.of(number))
        arrivals.wait(10)
        transfer.cancel()
    assert emulator.calls["cuMemHostRegister"] <= 3
    assert emulator.calls["cuEventCreate"] == 3


def test_copies_alternate_between_two_streams(
    emulator: Emulator, gpu: Context, arena: DeviceArena, ring: Ring
) -> None:
    ring.connect(gpu, streams=2)
    arrivals, transfer = Arrivals(), ring.transfer()
    for number in range(10):
        put(transfer, b"data", arena.address, arrivals.of(number))
    arrivals.wait(10)
    assert [stream.copies for stream in emulator._streams.values()] == [5, 5]


def test_a_child_gets_no_copy_of_the_buffers(ring: Ring) -> None:
    with ring.transfer().slot() as slot:
        address = ctypes.addressof(ctypes.c_char.from_buffer(slot.view))
    flags = [line.split()[1:] for line in mapping_of(address) if line.startswith("VmFlags:")]
    assert "dc" in flags[0]


def mapping_of(address: int) -> list[str]:
    """What the kernel says of the mapping at an address."""
    found: list[str] = []
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(part, 16) for part in words[0].split("-"))
            here = begin <= address < end
        elif here:
            found.append(line)
    return found


def test_memory_that_cannot_be_locked_is_copied_from_all_the_same(
    emulator: Emulator, gpu: Context, arena: DeviceArena, ring: Ring
) -> None:
    emulator.fail("cuMemHostRegister", nth=1, code="CUDA_ERROR_OPERATING_SYSTEM")
    ring.connect(gpu)
    arrivals, transfer = Arrivals(), ring.transfer()
    for number in range(20):
        put(transfer, b"%4d" % number, arena.address + 4 * number, arrivals.of(number))
    arrivals.wait(20)
    want = b"".join(b"%4d" % number for number in range(20))
    assert ctypes.string_at(arena.address, 80) == want
    assert emulator.calls["cuMemHostRegister"] == 1
    assert "could not be locked: CUDA_ERROR_OPERATING_SYSTEM" in ring.note


def test_a_slot_that_is_left_is_given_back(ring: Ring) -> None:
    transfer = ring.transfer()
    for _ in range(10):
        with pytest.raises(OSError, match="disk"), transfer.slot():
            raise OSError("disk")
    transfer.cancel()


def test_a_copy_beyond_the_buffer_is_refused(ring: Ring) -> None:
    transfer = ring.transfer()
    for copy in (Copy(1, 2 * PAGE - 4, 5), Copy(1, -1, 5), Copy(1, 0, 5, count=9, stride=PAGE)):
        with pytest.raises(DeviceError, match="reaches beyond its buffer"), transfer.slot() as slot:
            slot.submit([copy], lambda error: None)
    assert transfer.open == 0


CALLS = ["cuMemcpyHtoDAsync", "cuEventRecord", "cuEventSynchronize", "cuCtxSetCurrent"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", ["CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_LAUNCH_FAILED"])
def test_a_call_that_fails_ends_everything_that_waits(
    emulator: Emulator, gpu: Context, arena: DeviceArena, call: str, code: str
) -> None:
    ring = Ring(3, PAGE)
    arrivals, transfer = Arrivals(), ring.transfer()
    # Before the ring has threads: this one has its context already.
    gpu.bind()
    emulator.fail(call, nth=2, code=code)
    ring.connect(gpu)
    with pytest.raises(DeviceError, match=code):
        flood(transfer, arena.address, arrivals)
    handed_in = arrivals.asked
    arrivals.wait(handed_in)
    told = dict(arrivals.told)
    assert len(arrivals.told) == len(told) == handed_in  # each once
    failed = [error for error in told.values() if error is not None]
    assert all(code in str(error) and call in str(error) for error in failed)
    with pytest.raises(DeviceError, match=code):
        ring.transfer().slot()
    transfer.cancel()
    ring.close()


def test_a_chunk_that_is_sent_by_half_is_given_up_only_once_the_device_lets_go(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    ring = Ring(2, PAGE)
    ring.connect(gpu)
    arrivals, transfer = Arrivals(), ring.transfer()
    emulator.hold()
    emulator.fail("cuMemcpyHtoDAsync", nth=2)
    with transfer.slot() as slot:
        slot.view[:8] = b"one, two"
        copies = [Copy(arena.address, 0, 4), Copy(arena.address + 4, 4, 4)]
        slot.submit(copies, arrivals.of(0))
    eventually(lambda: ring.error is not None)
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        transfer.slot()
    # The first of the two copies has its turn still to come.
    assert arrivals.told == []
    assert len(ring._free) == 1
    emulator.go.set()
    arrivals.wait(1)
    assert len(ring._free) == 2
    ring.close()


@pytest.mark.parametrize("nth", [1, 2, 7])
def test_a_device_lost_in_mid_load_ends_everything_that_waits(
    emulator: Emulator, gpu: Context, arena: DeviceArena, nth: int
) -> None:
    ring = Ring(3, PAGE)
    ring.connect(gpu, streams=2)
    arrivals, transfer = Arrivals(), ring.transfer()
    emulator.fail_copy(nth, "CUDA_ERROR_ECC_UNCORRECTABLE")
    handed_in = [0] * 4

    def read(reader: int) -> None:
        while True:
            put(transfer, b"data", arena.address, arrivals.of(reader))
            handed_in[reader] += 1

    for thread, raised in [in_thread(lambda reader=n: read(reader)) for n in range(4)]:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert isinstance(raised[0], DeviceLost)
        assert "CUDA_ERROR_ECC_UNCORRECTABLE" in str(raised[0])
        assert "Xid" in raised[0].hint
    arrivals.wait(sum(handed_in))
    assert len([1 for _, error in arrivals.told if error is None]) < nth
    assert len(arrivals.told) == sum(handed_in)
    transfer.cancel()
    ring.close()


def test_a_device_that_never_comes_up_ends_everything_that_waits(ring: Ring) -> None:
    arrivals, transfer = Arrivals(), ring.transfer()
    for number in range(3):
        put(transfer, b"data", 1 << 45, arrivals.of(number))
    waiting, raised = in_thread(lambda: transfer.slot())
    error = DeviceError("no context can be made on the GPU")
    ring.fail(error)
    waiting.join(PATIENCE_S)
    assert raised == [error]
    assert arrivals.told == [(number, error) for number in range(3)]


@pytest.mark.parametrize("call", ["cuStreamCreate", "cuEventCreate", "cuCtxSetCurrent"])
def test_a_context_that_gives_nothing_ends_it(emulator: Emulator, gpu: Context, call: str) -> None:
    ring = Ring(3, PAGE)
    arrivals, transfer = Arrivals(), ring.transfer()
    put(transfer, b"data", 1 << 45, arrivals.of(0))
    emulator.fail(call, nth=2 if call == "cuEventCreate" else 1)
    with pytest.raises(DeviceError, match=call):
        ring.connect(gpu)
    ((_, error),) = arrivals.told
    assert call in str(error)
    ring.close()


def test_cancel_waits_until_nothing_touches_the_buffers(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    ring = Ring(4, PAGE)
    ring.connect(gpu)
    arrivals, transfer = Arrivals(), ring.transfer()
    emulator.hold()
    for number in range(3):
        put(transfer, b"data", arena.address, arrivals.of(number))
    eventually(lambda: emulator.calls["cuEventRecord"] == 3)
    reading = transfer.slot()
    waiting, raised = in_thread(transfer.slot)
    cancelling, _ = in_thread(transfer.cancel)
    waiting.join(PATIENCE_S)
    assert isinstance(raised[0], ReplicaError)
    assert cancelling.is_alive()
    emulator.go.set()
    eventually(lambda: transfer.open == 1)
    assert cancelling.is_alive()  # a reader has a slot still
    with pytest.raises(ReplicaError, match="cancelled"):
        reading.submit([], arrivals.of(9))
    cancelling.join(PATIENCE_S)
    assert not cancelling.is_alive()
    assert arrivals.told == []
    with pytest.raises(ReplicaError, match="cancelled"):
        transfer.slot()
    # The ring goes on.
    put(ring.transfer(), b"next", arena.address, arrivals.of(4))
    arrivals.wait(1)
    assert ctypes.string_at(arena.address, 4) == b"next"
    ring.close()


def test_one_load_is_cancelled_and_another_goes_on(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    ring = Ring(4, PAGE)
    first, second, arrivals = ring.transfer(), ring.transfer(), Arrivals()
    for number in range(2):
        put(first, b"first", arena.address, arrivals.of(number))
        put(second, b"second", arena.address + 8, arrivals.of(10 + number))
    first.cancel()
    ring.connect(gpu)
    arrivals.wait(2)
    assert arrivals.told == [(10, None), (11, None)]
    assert ctypes.string_at(arena.address, 5) == bytes(5)
    ring.close()


def test_who_is_told_and_raises_ends_the_ring_with_that(
    emulator: Emulator, gpu: Context, arena: DeviceArena
) -> None:
    ring = Ring(2, PAGE)
    ring.connect(gpu)
    transfer, arrivals = ring.transfer(), Arrivals()

    def arrived(error: ColdframeError | None) -> None:
        raise KeyError("a mistake")

    put(transfer, b"data", arena.address, arrived)
    with pytest.raises(DeviceError, match="copies to the device broke, got KeyError"):
        flood(transfer, arena.address, arrivals)
    transfer.cancel()
    ring.close()


def test_a_ring_that_is_closed_is_not_connected_any_more(emulator: Emulator, gpu: Context) -> None:
    ring = Ring(2, PAGE)
    ring.close()
    with pytest.raises(ReplicaError, match="are ended"):
        ring.connect(gpu)
    assert emulator.calls["cuStreamCreate"] == 0


# Streams, what happens meanwhile, and after how many chunks.
CHAOS = st.tuples(
    st.sampled_from([1, 2]),
    st.sampled_from(["nothing", "cancel", "call fails", "copy fails", "close", "late"]),
    st.integers(0, 30),
    st.sampled_from([0.0, 0.0, 0.0003]),
)


@settings(max_examples=25)
@given(CHAOS)
def test_each_chunk_is_told_of_once_whatever_happens(how: tuple[int, str, int, float]) -> None:
    each_chunk_is_told_of_once(*how)


@pytest.mark.heavy
@settings(max_examples=600)
@given(CHAOS)
def test_each_chunk_is_told_of_once_whatever_happens_at_length(
    how: tuple[int, str, int, float],
) -> None:
    each_chunk_is_told_of_once(*how)


def each_chunk_is_told_of_once(streams: int, event: str, after: int, delay: float) -> None:
    emulator = Emulator(delay=delay)
    gpu = Context(Driver.open(emulator), 0)
    arena = DeviceArena(gpu, 2 << 20, writable=False)
    arena.grow(2 << 20)
    ring = Ring(3, PAGE)
    transfer, other = ring.transfer(), ring.transfer()
    if event != "late":
        ring.connect(gpu, streams=streams)
    if event == "call fails":
        emulator.fail("cuMemcpyHtoDAsync", nth=after + 1)
    if event == "copy fails":
        emulator.fail_copy(after + 1)
    told: dict[int, list[ColdframeError | None]] = {number: [] for number in range(40)}
    wrong: list[int] = []
    handed_in: list[int] = []
    numbers = iter(range(40))
    reached = threading.Event()
    lock = threading.Lock()

    def read() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            data = bytes([number]) * 50

            def arrived(error: ColdframeError | None, number: int = number) -> None:
                here = ctypes.string_at(arena.address + 50 * number, 50)
                if error is None and here != bytes([number]) * 50:
                    wrong.append(number)
                told[number].append(error)

            if number == after:
                reached.set()
            put(transfer, data, arena.address + 50 * number, arrived)
            with lock:
                handed_in.append(number)

    readers = [in_thread(read) for _ in range(4)]
    if event == "late":
        ring.connect(gpu, streams=streams)
    if event in ("cancel", "close") and reached.wait(PATIENCE_S):
        (transfer.cancel if event == "cancel" else ring.close)()
    for reader, _ in readers:
        reader.join(PATIENCE_S)
        assert not reader.is_alive()
    if event == "cancel":
        before = sum(map(len, told.values()))
        done = threading.Event()
        put(other, b"goes on", arena.address + 4096, lambda error: done.set())
        assert done.wait(PATIENCE_S)
        assert sum(map(len, told.values())) == before  # nobody is told after a cancel
    else:
        eventually(lambda: transfer.open == 0)
        assert all(len(told[number]) == 1 for number in handed_in)
    assert wrong == []
    assert all(len(errors) <= 1 for errors in told.values())
    if event in ("nothing", "late"):
        assert all(errors == [None] for errors in told.values())
    transfer.cancel()
    ring.close()
    arena.close()
    if not emulator.is_lost:
        gpu.close()
        assert emulator.left() == []
    emulator.close()


def test_a_ring_that_is_closed_tells_everybody(gpu: Context, arena: DeviceArena) -> None:
    ring = Ring(2, PAGE)
    arrivals, transfer = Arrivals(), ring.transfer()
    put(transfer, b"data", arena.address, arrivals.of(0))
    waiting, raised = in_thread(lambda: [transfer.slot() for _ in range(2)])
    ring.close()
    waiting.join(PATIENCE_S)
    ((_, error),) = arrivals.told
    assert isinstance(error, ReplicaError)
    assert isinstance(raised[0], ReplicaError)
    ring.close()
