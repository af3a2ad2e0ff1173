"""Chunks of extents as copies, and a whole checkpoint through the ring into a GPU's memory."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Extent, Layout, Plan
from coldframe.loader.checkpoints.slices import Rank
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.copies import copies_of
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.device_placer import DevicePlacer, buffer_bytes
from coldframe.loader.devices.ring import Ring
from coldframe.loader.errors import ColdframeError, SourceError
from coldframe.loader.sources.direct import congruent
from coldframe.loader.sources.file import FileSource
from tests.loader.checkpoints.drawn import extents
from tests.loader.checkpoints.written import write_model
from tests.loader.devices.emulator import Emulator
from tests.loader.weights import arena_tensors, layered, reference

DATA = random.Random(5).randbytes(4000)


@settings(max_examples=200)
@given(extent=extents(), cuts=st.lists(st.integers(1, 2000), max_size=6), lead=st.integers(0, 50))
def test_every_byte_of_a_run_is_copied_once_however_it_is_cut(
    extent: Extent, cuts: list[int], lead: int
) -> None:
    expected, memory, times = bytearray(4096), bytearray(4096), bytearray(4096)
    for run in extent.runs:
        for row in range(run.count):
            begin = extent.file_offset + run.offset + row * run.stride
            place = run.arena_offset + row * run.length
            expected[place : place + run.length] = DATA[begin : begin + run.length]
            times[place : place + run.length] = b"\1" * run.length
    start, stop = extent.file_offset, extent.file_offset + extent.length
    bounds = sorted({start, stop, *(cut for cut in cuts if start < cut < stop)})
    for low, high in itertools.pairwise(bounds):
        buffer = bytes(lead) + DATA[low:high]
        copies = list(copies_of(extent, low, high, lead))
        # A run is three copies at most: its whole rows, and what is cut off at either end.
        assert len(copies) <= 3 * len(extent.runs)
        for copy in copies:
            assert copy.end <= len(buffer)
            for row in range(copy.count):
                at, place = copy.offset + row * copy.stride, copy.place + row * copy.length
                memory[place : place + copy.length] = buffer[at : at + copy.length]
                for byte in range(place, place + copy.length):
                    times[byte] -= 1
    assert memory == expected
    assert not any(times)


def load(gpu: Context, root: Path, plan: Plan, *, streams: int, threads: int = 3) -> memoryview:
    """A plan's bytes in a new arena of the GPU, read by several threads."""
    arena = DeviceArena(gpu, plan.arena_bytes, writable=False)
    arena.grow(plan.arena_bytes)
    chunk = 8192
    ring = Ring(threads + 2, buffer_bytes(chunk))
    source = FileSource(Checkpoint.open(root).shards)
    transfer = ring.transfer()
    transfer.base = arena.address
    placer = DevicePlacer(source, transfer)
    chunks = [
        (extent, start, min(start + chunk, extent.file_offset + extent.length))
        for stage in plan.stages
        for extent in stage.extents
        for start in range(extent.file_offset, extent.file_offset + extent.length, chunk)
    ]
    left, arrived = iter(chunks), threading.Semaphore(0)
    errors: list[ColdframeError] = []
    lock = threading.Lock()

    def told(error: ColdframeError | None) -> None:
        if error is not None:
            errors.append(error)
        arrived.release()

    def read() -> None:
        while True:
            with lock:
                chunk = next(left, None)
            if chunk is None:
                return
            placer.fetch(*chunk, told)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(threads)]
    for reader in readers:
        reader.start()
    ring.connect(gpu, streams=streams)
    for _ in chunks:
        assert arrived.acquire(timeout=60)
    for reader in readers:
        reader.join(60)
    assert errors == []
    memory = memoryview(ctypes.string_at(arena.address, plan.arena_bytes))
    transfer.cancel()
    ring.close()
    source.close()
    arena.close()
    return memory


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("streams", [1, 2])
def test_a_checkpoint_lands_in_the_gpus_memory(
    tmp_path: Path, emulator: Emulator, gpu: Context, layout: Layout, streams: int
) -> None:
    root = layered(tmp_path / "m")
    plan = Plan.build(Checkpoint.open(root), layout=layout)
    emulator.delay = 0.0002
    memory = load(gpu, root, plan, streams=streams)
    assert arena_tensors(plan, memory) == reference(root)


def test_slices_by_columns_land_as_rows(tmp_path: Path, emulator: Emulator, gpu: Context) -> None:
    names = [f"model.layers.{n}.mlp.down_proj.weight" for n in range(2)]
    dice = random.Random(1)
    tensors = [(name, "U8", [9, 4098], dice.randbytes(9 * 4098)) for name in names]
    root = write_model(tmp_path / "m", [tensors])
    plan = Plan.build(Checkpoint.open(root), layout=Layout.ALIGNED, rank=Rank(1, 2))
    memory = load(gpu, root, plan, streams=1)
    for name, _, _, data in tensors:
        right = b"".join(data[4098 * row + 2049 : 4098 * (row + 1)] for row in range(9))
        at = plan.placements[name].arena_offset
        assert memory[at : at + 9 * 2049] == right
    assert emulator.calls["cuMemcpy2DAsync"] > 0


def test_a_disk_may_write_into_the_buffer_by_itself(tmp_path: Path) -> None:
    """Address and offset agree modulo a block, wherever a chunk begins."""
    checkpoint = Checkpoint.open(layered(tmp_path / "m"))
    source = FileSource(checkpoint.shards)
    plain, seen = source.read_into, []

    def read_into(shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        seen.append(all(congruent(offset, part) for part in parts))
        plain(shard, offset, parts)

    source.read_into = read_into  # type: ignore[method-assign]
    extent = Plan.build(checkpoint).stages[0].extents[0]
    ring = Ring(4, buffer_bytes(8192))
    placer = DevicePlacer(source, ring.transfer())
    for start in (0, 1, 4095, 4097):  # nobody empties the ring: what counts is the read
        begin = extent.file_offset + start
        placer.fetch(extent, begin, begin + 8192, lambda error: None)
    ring.close()
    source.close()
    assert seen == [True] * 4


def test_what_cannot_be_read_gives_its_buffer_back(tmp_path: Path, gpu: Context) -> None:
    root = layered(tmp_path / "m")
    plan = Plan.build(Checkpoint.open(root))
    source = FileSource(Checkpoint.open(root).shards)
    for path in root.glob("*.safetensors"):
        path.write_bytes(b"")
    ring = Ring(1, buffer_bytes(8192))
    transfer = ring.transfer()
    placer = DevicePlacer(source, transfer)
    extent = plan.stages[0].extents[0]
    for _ in range(3):
        with pytest.raises(SourceError):
            placer.fetch(extent, extent.file_offset, extent.file_offset + 8192, lambda error: None)
    transfer.cancel()
    ring.close()
    source.close()
