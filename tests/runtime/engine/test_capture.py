"""How a GPU's steps are captured: what torch is asked for, in which order, and with what memory.

Torch's own classes need a GPU. Those that stand for them here do what torch does with memory: a
capture asks the allocator of its pool for it, through the address of a function, as C++ does. The
memory is that of the emulated driver.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch

from coldframe.loader.arena import SCRATCH_BASE
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.scratch import Scratch
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import DeviceError
from coldframe.runtime.engine.capture import CudaCapturer
from coldframe.runtime.graphs.graphing import capturer_for
from tests.loader.devices.emulator import Emulator

MIB = 1 << 20
GPU = torch.device("cuda", 0)


class Torch:
    """What stands for torch's part in a capture, and what was asked of it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.fails: str | None = None
        self.pools: list[Any] = []
        self.live = WeakValueDictionary[Any, Pool]()
        self.piece = 2 * MIB

    def customise(self, patch: pytest.MonkeyPatch) -> None:
        """Has torch take memory from outside."""

        def make(alloc: int, free: int) -> tuple[Any, Any]:
            allocate = ctypes.CFUNCTYPE(
                ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p
            )
            release = ctypes.CFUNCTYPE(
                None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p
            )
            return allocate(alloc), release(free)

        patch.setattr(torch._C, "_cuda_customAllocator", make, raising=False)
        patch.setattr(torch.cuda, "MemPool", lambda allocator: Pool(self, allocator))

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts itself in the place of what is there."""
        said = self.said.append
        patch.delattr(torch._C, "_cuda_customAllocator", raising=False)
        patch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph: Graph(self, keep_graph))
        patch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "side"))
        patch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, "current"))
        patch.setattr(torch.cuda, "synchronize", lambda device: said("synchronize"))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: said("clear"), raising=False)
        patch.setattr(
            torch._C,
            "_cuda_endAllocateToPool",
            lambda device, pool: said(f"end {pool}"),
            raising=False,
        )

        @contextmanager
        def stream(which: Stream) -> Iterator[None]:
            said(f"on {which.name}")
            yield
            said("off")

        patch.setattr(torch.cuda, "stream", stream)


class Stream:
    def __init__(self, torch_: Torch, name: str) -> None:
        self.torch, self.name = torch_, name

    def wait_stream(self, stream: Stream) -> None:
        self.torch.said.append(f"{self.name} waits for {stream.name}")


class Pool:
    """Memory of an allocator, kept until the pool is given up."""

    def __init__(self, torch_: Torch, allocator: Any) -> None:
        self.allocate, self.release = allocator
        self.id = (0, 100 + len(torch_.pools))
        self.pieces: list[int] = []
        torch_.pools.append(self.id)
        torch_.live[self.id] = self
        self.torch = torch_

    def take(self, nbytes: int) -> None:
        address = self.allocate(nbytes, 0, None)
        if address is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.pieces.append(address)

    def __del__(self) -> None:
        for piece in self.pieces:
            self.release(piece, self.torch.piece, 0, None)


class Graph:
    def __init__(self, torch_: Torch, keep_graph: bool) -> None:
        assert keep_graph  # or there is nothing left to save
        self.torch = torch_
        self.state = "new"

    def capture_begin(self, pool: Any, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local"
        assert not gc.isenabled()
        self.torch.said.append(f"begin {pool}")
        self.state = "capturing"
        if pool in self.torch.live:
            self.torch.live[pool].take(self.torch.piece)

    def capture_end(self) -> None:
        assert self.state == "capturing"
        self.state = "failed" if self.torch.fails == "end" else "captured"
        self.torch.said.append("ended")
        if self.state == "failed":
            raise RuntimeError("CUDA error: operation failed due to a previous error")

    def instantiate(self) -> None:
        assert self.state == "captured"
        self.torch.said.append("instantiate")

    def replay(self) -> None:
        self.torch.said.append("replay")

    def raw_cuda_graph(self) -> int:
        return 0x1234

    def reset(self) -> None:
        self.torch.said.append("reset")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Torch:
    made = Torch()
    made.install(monkeypatch)
    return made


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    emulator = Emulator(64 * MIB)
    yield emulator
    emulator.close()


@pytest.fixture
def capturer(
    fake: Torch, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CudaCapturer]:
    """With memory of a worker's own, that torch takes."""
    fake.customise(monkeypatch)
    monkeypatch.setattr(DeviceReservation, "dlpack_device", property(lambda self: (1, 0)))
    scratches: list[Scratch] = []

    def scratch() -> Scratch:
        scratches.append(Scratch(Context(Driver.open(emulator), 0), 1 << 30))
        return scratches[-1]

    capturer = CudaCapturer(GPU, scratch)
    yield capturer
    capturer.drop()
    capturer._spoilt.clear()  # what pools are made of is ours, and goes behind them
    for made in scratches:
        made.close()


def test_the_stand_ins_are_called_as_torchs_are() -> None:
    for ours, theirs in (
        (Graph.capture_begin, torch.cuda.CUDAGraph.capture_begin),
        (Graph.capture_end, torch.cuda.CUDAGraph.capture_end),
        (Graph.__init__, torch.cuda.CUDAGraph.__new__),
        (Pool.__init__, torch.cuda.MemPool.__init__),
        (Stream.wait_stream, torch.cuda.Stream.wait_stream),
    ):
        known = inspect.signature(theirs).parameters
        assert set(inspect.signature(ours).parameters) - {"self", "torch_"} <= set(known)


def test_nothing_is_asked_for_before_there_is_something_to_capture(
    capturer: CudaCapturer, fake: Torch, emulator: Emulator
) -> None:
    assert (capturer.scratch, capturer.note) == (None, "")
    assert (fake.said, emulator.used) == ([], 0)


def test_a_step_is_captured_in_memory_of_the_workers_own(
    capturer: CudaCapturer, fake: Torch, emulator: Emulator
) -> None:
    place = capturer.place(100)
    assert place.data_ptr() == SCRATCH_BASE
    place.fill_(7)  # there is memory behind it
    graph = capturer.capture(lambda: fake.said.append("work"))
    assert fake.said == [
        "clear",
        "side waits for current",
        "on side",
        "begin (0, 100)",
        "work",
        "ended",
        "off",
        "instantiate",
    ]
    assert gc.isenabled()
    assert capturer.scratch == (SCRATCH_BASE, 512 + 2 * MIB)
    assert emulator.used == 16 * MIB
    assert graph.handle == 0x1234
    graph.replay()
    graph.close()
    assert fake.said[-2:] == ["replay", "reset"]


def test_all_captures_share_a_pool_until_it_is_dropped(capturer: CudaCapturer, fake: Torch) -> None:
    capturer.place(100)
    for _ in range(3):
        capturer.capture(lambda: None).close()
    assert fake.pools == [(0, 100)]
    scratch = capturer.scratch
    assert scratch is not None
    assert scratch[1] == 512 + 6 * MIB
    fake.said.clear()
    capturer.drop()
    capturer.drop()
    assert fake.said == ["synchronize", "clear"]
    assert capturer.scratch == (SCRATCH_BASE, 512)  # what was placed stays
    capturer.capture(lambda: None)
    assert fake.pools == [(0, 100), (0, 101)]
    assert capturer.scratch == (SCRATCH_BASE, 512 + 2 * MIB)


def test_a_pool_is_stocked_before_the_first_capture(
    capturer: CudaCapturer, fake: Torch, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch keeps what lies free in a pool, it then calls for little more."""
    asked: list[int] = []

    @contextmanager
    def use(pool: Pool, device: torch.device) -> Iterator[None]:
        fake.said.append("stock")
        yield
        fake.said.append("stocked")

    def empty(nbytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device == GPU
        asked.append(nbytes)
        return torch.zeros(1, dtype=dtype)

    capturer.place(100)
    fake.said.clear()
    monkeypatch.setattr(torch.cuda, "use_mem_pool", use)
    monkeypatch.setattr(Pool, "use_count", lambda self: 1, raising=False)
    monkeypatch.setattr(torch, "empty", empty)
    capturer.capture(lambda: None)
    assert fake.said[:4] == ["on side", "stock", "stocked", "off"]
    assert (max(asked), sum(asked)) == (32 * MIB, 48 * MIB)
    fake.said.clear()
    capturer.capture(lambda: None)
    assert "stock" not in fake.said


@pytest.mark.parametrize("fails", ["work", "end", "memory"])
def test_behind_a_capture_that_failed_the_next_one_works(
    capturer: CudaCapturer, fake: Torch, fails: str
) -> None:
    capturer.place(100)
    kept = capturer.capture(lambda: None)

    def work() -> None:
        if fails == "work":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    fake.fails = fails
    fake.piece = 100 * MIB if fails == "memory" else 2 * MIB
    expected = torch.OutOfMemoryError if fails == "memory" else RuntimeError
    with pytest.raises(expected):
        capturer.capture(work)
    assert "end (0, 100)" in fake.said
    assert gc.isenabled()
    fake.fails, fake.piece = None, 2 * MIB
    fake.said.clear()
    # In a pool of its own, and the spoilt one is never given up: torch would not bear that.
    gc.collect()
    assert [type(kept).__name__ for kept in capturer._spoilt] == ["Graph", "Pool"]
    capturer.capture(lambda: None)
    assert "begin (0, 101)" in fake.said
    kept.replay()
    capturer.drop()
    scratch = capturer.scratch
    assert scratch is not None
    assert scratch[1] >= 512 + 2 * MIB


def test_a_torch_that_takes_no_memory_captures_in_its_own(
    fake: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Scratch:
        raise AssertionError

    places: list[Any] = []

    def empty(nbytes: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        places.append((nbytes, device))
        return torch.zeros(nbytes, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    capturer = CudaCapturer(GPU, never)
    capturer.place(100)
    assert places == [(100, GPU)]
    capturer.capture(lambda: None).replay()
    assert "begin (0, 7)" in fake.said
    assert capturer.scratch is None
    assert capturer.note.startswith("its memory is torch's own: this torch takes no memory")
    with pytest.raises(DeviceError, match="have no memory here"):
        capturer.reach(1)


def test_a_driver_that_has_no_addresses_costs_the_archive_alone(
    capturer: CudaCapturer, fake: Torch, emulator: Emulator
) -> None:
    emulator.fail("cuMemAddressReserve", 1, "CUDA_ERROR_OUT_OF_MEMORY")
    capturer.capture(lambda: None)
    assert "begin (0, 7)" in fake.said
    assert capturer.scratch is None
    assert "CUDA_ERROR_OUT_OF_MEMORY" in capturer.note


def test_memory_at_another_place_is_as_good_but_here_alone(
    capturer: CudaCapturer, emulator: Emulator
) -> None:
    context = Context(Driver.open(emulator), 0)
    taken = DeviceReservation(context, 2 * MIB, SCRATCH_BASE, exact=True)
    assert capturer.place(100).data_ptr() != SCRATCH_BASE
    capturer.capture(lambda: None).replay()
    assert capturer.scratch is None
    assert capturer.note == "its memory lies elsewhere than in other processes"
    with pytest.raises(DeviceError, match="have no memory here"):
        capturer.reach(1)
    taken.close()


def test_memory_for_steps_of_others_is_had_in_advance(
    capturer: CudaCapturer, emulator: Emulator
) -> None:
    capturer.place(100)
    capturer.reach(20 * MIB)
    assert emulator.used == 32 * MIB
    with pytest.raises(DeviceError, match="OUT_OF_MEMORY"):
        capturer.reach(100 * MIB)


def test_a_cpu_captures_nothing() -> None:
    assert capturer_for(torch.device("cpu"), "cpu") is None
    assert isinstance(capturer_for(GPU, "cuda:0"), CudaCapturer)
