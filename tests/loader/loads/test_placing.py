from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Extent
from coldframe.loader.loads.placing import Placer
from coldframe.loader.sources.file import FileSource
from tests.loader.checkpoints.drawn import extents
from tests.loader.checkpoints.written import tensor, write_model
from tests.support import unavailable

DATA = random.Random(5).randbytes(4000)


class Bytes:
    """A shard that is in memory."""

    readers = chunk = verified = None
    note = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        assert all(parts)
        assert offset + sum(map(len, parts)) <= len(self.data)
        for part in parts:
            part[:] = self.data[offset : offset + len(part)]
            offset += len(part)

    def finish(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


@settings(max_examples=200, deadline=None)
@given(extent=extents(), cuts=st.lists(st.integers(1, 2000), max_size=6))
def test_every_byte_of_a_run_is_at_its_place_however_it_is_cut(
    extent: Extent, cuts: list[int]
) -> None:
    memory, expected = bytearray(4096), bytearray(4096)
    for run in extent.runs:
        for row in range(run.count):
            begin = extent.file_offset + run.offset + row * run.stride
            place = run.arena_offset + row * run.length
            expected[place : place + run.length] = DATA[begin : begin + run.length]
    start, stop = extent.file_offset, extent.file_offset + extent.length
    bounds = sorted({start, stop, *(cut for cut in cuts if start < cut < stop)})
    placer = Placer(Bytes(DATA), memoryview(memory))
    for low, high in itertools.pairwise(bounds):
        placer.fetch(extent, low, high)
    assert memory == expected


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_is_read_into_scattered_buffers(tmp_path: Path, direct: bool) -> None:
    model = write_model(tmp_path / "m", [[tensor("a", 300_000), tensor("b", 70_001)]])
    data = (model / "model.safetensors").read_bytes()
    source = FileSource(Checkpoint.open(model).shards)
    if direct and not source.use_direct():
        unavailable("this file system has no O_DIRECT")
    for offset, lengths in (
        (0, [len(data)]),
        (4096, [1, 8192, 4095, 100_000]),
        (12_345, [50_000, 3, 20_000]),
        (len(data) - 5, [2, 3]),
        (7, [0, 9]),
    ):
        parts = [memoryview(bytearray(length)) for length in lengths]
        source.read_into(0, offset, parts)
        assert b"".join(parts) == data[offset : offset + sum(lengths)]
    source.close()
