"""Verified loads: what is wrong on the way is mended or an error, and never a weight."""

from __future__ import annotations

import itertools
import mmap
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.checkpoints.sealing import seal_checkpoint
from coldframe.loader.checkpoints.verify import VerifiedSource, check_mapped
from coldframe.loader.devices.cpu import HostLanding
from coldframe.loader.errors import CheckpointError, ColdframeError, SourceCorrupt
from coldframe.loader.loads.placing import Placer
from coldframe.loader.loads.stream import Stream
from coldframe.loader.memory_service.board import Board, StageState
from coldframe.loader.sources.base import SEALED, Source
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.file import FileSource
from coldframe.loader.timeline import Recorder
from tests.loader.checkpoints.written import tensor, write_model
from tests.loader.weights import arena_tensors, evict, layered, reference, shard_files
from tests.support import unavailable

MIB = 1 << 20


class Faulty:
    """A source that flips bits of what another one reads.

    Args:
        inner: The other one.
        flips: Shard and offset of bytes, and how many times each arrives wrong.
    """

    chunk = None
    readers = 3
    note = "faulty"

    def __init__(self, inner: Source, flips: dict[tuple[int, int], int]) -> None:
        self.inner = inner
        self.flips = dict(flips)
        self.reads: list[tuple[int, int, int]] = []
        self.calls: list[str] = []
        self._lock = threading.Lock()

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        self.inner.read_into(shard, offset, parts)
        with self._lock:
            self.reads.append((shard, offset, sum(map(len, parts))))
            at = offset
            for part in parts:
                for (where, flip), left in self.flips.items():
                    if where == shard and at <= flip < at + len(part) and left:
                        part[flip - at] ^= 4
                        self.flips[where, flip] -= 1
                at += len(part)

    def finish(self) -> None:
        self.calls.append("finish")

    def abort(self) -> None:
        self.calls.append("abort")

    def close(self) -> None:
        self.calls.append("close")


class Model:
    """A checkpoint and its seal."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoint = Checkpoint.open(root)
        self.data = [path.read_bytes() for path in shard_files(root)]
        self.source = FileSource(self.checkpoint.shards)
        self.seal = seal_checkpoint(self.checkpoint, DirectoryOrigin(str(root)), self.source)

    def faulty(self, flips: dict[tuple[int, int], int]) -> tuple[VerifiedSource, Faulty]:
        inner = Faulty(self.source, flips)
        return VerifiedSource(inner, self.seal, self.checkpoint), inner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Tensors of several pieces, of one, and of none."""
    sizes = [3 * MIB + 5, 10, 0, 1, MIB, 999]
    data = random.Random(1).randbytes(5 * MIB)
    tensors = [[(f"{s}{i}", "U8", [n], data[i : i + n]) for i, n in enumerate(sizes)] for s in "ab"]
    made = Model(write_model(tmp_path_factory.mktemp("verify") / "m", tensors))
    yield made
    made.source.close()


def read(source: Source, shard: int, start: int, stop: int, walls: Sequence[int] = ()) -> bytes:
    """Reads a stretch into buffers that end at the walls."""
    buffer = memoryview(bytearray(stop - start))
    edges = sorted({0, stop - start, *(wall - start for wall in walls if start < wall < stop)})
    parts = [buffer[a:b] for a, b in itertools.pairwise(edges)]
    source.read_into(shard, start, parts)
    return bytes(buffer)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_stretch_in_any_buffers(model: Model, data: st.DataObject) -> None:
    source, inner = model.faulty({})
    shard = data.draw(st.integers(0, 1))
    whole = model.data[shard]
    first = model.checkpoint.shards[shard].data_offset
    near = st.one_of(
        st.integers(first, len(whole)),
        st.sampled_from(sorted({t.offset for t in model.checkpoint.tensors.values()})),
        st.sampled_from([MIB, 2 * MIB, 4 * MIB]),
    ).map(lambda at: min(max(at, first), len(whole)))
    start, stop = sorted((data.draw(near), data.draw(near)))
    walls = data.draw(st.lists(near, max_size=5))
    assert read(source, shard, start, stop, walls) == whole[start:stop]
    assert source.verified_bytes == stop - start
    # One read, of whole pieces: less than one more on either side.
    assert len(inner.reads) == (stop > start)
    for _, offset, length in inner.reads:
        assert offset <= start < offset + MIB
        assert stop <= offset + length < stop + MIB


def edges_of_pieces(model: Model) -> list[tuple[int, int]]:
    """The first and last byte of each piece, by shard."""
    found = []
    for shard, pieces in enumerate(model.seal.pieces_of(model.checkpoint)):
        for piece in range(len(pieces)):
            found += [(shard, pieces.cuts[piece]), (shard, pieces.cuts[piece + 1] - 1)]
    return found


def test_a_flipped_bit_is_mended_wherever_it_is(model: Model) -> None:
    for flip in edges_of_pieces(model):
        source, inner = model.faulty({flip: 1})
        for shard, whole in enumerate(model.data):
            first = model.checkpoint.shards[shard].data_offset
            walls = [first + 3, 2 * MIB + 1, len(whole) - 500]
            assert read(source, shard, first, len(whole), walls) == whole[first:]
        assert source.mended_pieces == 1
        # Only the piece is read again.
        assert len(inner.reads) == 3
        shard, offset, length = min(inner.reads, key=lambda read: read[2])
        assert shard == flip[0]
        assert offset <= flip[1] < offset + length <= offset + MIB


def test_a_bit_that_is_wrong_twice_is_an_error_that_names_the_tensor(model: Model) -> None:
    for shard, at in edges_of_pieces(model):
        source, _ = model.faulty({(shard, at): 2})
        file = model.checkpoint.shards[shard]
        with pytest.raises(SourceCorrupt) as caught:
            read(source, shard, file.data_offset, file.size)
        (name,) = [
            t.name
            for t in model.checkpoint.tensors.values()
            if t.shard == shard and t.offset <= at < t.offset + t.nbytes
        ]
        where = str(caught.value.where)
        assert where.startswith(f"{file.uri}, bytes ")
        assert where.endswith(f", tensor '{name}'")
        start, stop = map(int, where.split("bytes ")[1].split(",")[0].split(" to "))
        assert start <= at < stop
        assert source.verified_bytes == 0


def test_a_fault_beside_what_was_asked_for_is_one_of_its_piece(model: Model) -> None:
    first = model.checkpoint.shards[0].data_offset
    source, inner = model.faulty({(0, first + 7): 1})
    assert read(source, 0, first + 8, first + 9) == model.data[0][first + 8 : first + 9]
    assert source.mended_pieces == 1
    assert source.verified_bytes == 1
    assert inner.reads == [(0, first, MIB - first), (0, first, MIB - first)]


def test_a_header_is_no_data(model: Model) -> None:
    source, inner = model.faulty({})
    for start, stop in ((0, 8), (0, 2 * MIB), (8, model.checkpoint.shards[0].data_offset + 1)):
        with pytest.raises(ValueError, match="not all data"):
            read(source, 0, start, stop)
    assert inner.reads == []


def test_all_else_is_the_inner_source_s(model: Model) -> None:
    source, inner = model.faulty({})
    assert (source.readers, source.chunk) == (5, None)  # two more than the inner one has
    assert source.note == "faulty"
    assert source.verified == SEALED
    source.finish()
    source.abort()
    source.close()
    assert inner.calls == ["finish", "abort", "close"]


def test_a_seal_of_another_checkpoint(model: Model, tmp_path: Path) -> None:
    other = Checkpoint.open(write_model(tmp_path / "m", [[tensor("a", 9)]]))
    with pytest.raises(CheckpointError, match="sealed before it was changed"):
        VerifiedSource(FileSource([]), model.seal, other)
    with pytest.raises(CheckpointError, match="sealed before it was changed"):
        check_mapped([memoryview(b"")], model.seal, other)


# -- with the stream --------------------------------------------------------------------------


def stream(checkpoint: Checkpoint, source: Source, layout: str, on_stage: Callable[[int], None]):  # type: ignore[no-untyped-def]
    """Streams all of it into memory: plan, bytes, board's states, and how it ended."""
    plan = Plan.build(checkpoint, layout=layout)
    memory = memoryview(mmap.mmap(-1, plan.arena_bytes))
    board = Board([stage.nbytes for stage in plan.stages])
    ends: list[ColdframeError | None] = []
    ended = threading.Event()

    def on_end(error: ColdframeError | None) -> None:
        ends.append(error)
        ended.set()

    running = Stream(
        plan,
        HostLanding(Placer(source, memory)).fetch,
        board,
        finish=source.finish,
        on_stage=on_stage,
        on_end=on_end,
        recorder=Recorder("memory"),
        threads=4,
    )
    running.start()
    assert ended.wait(30)
    running.cancel()
    states = [board.state(stage.index) for stage in plan.stages]
    board.close()
    return plan, memory, states, ends[0]


@pytest.mark.parametrize("layout", ["file", "aligned"])
@pytest.mark.parametrize("how", ["buffered", "direct"])
def test_a_stream_reads_whole_pieces(tmp_path: Path, layout: str, how: str) -> None:
    made = Model(layered(tmp_path / "m", layers=2, nbytes=5_000_001))
    if how == "direct":
        for path in shard_files(made.root):
            evict(path)
        if not made.source.use_direct():
            unavailable("this file system has no O_DIRECT")
    source, counting = made.faulty({})
    plan, memory, states, error = stream(made.checkpoint, source, layout, lambda stage: None)
    assert error is None
    assert set(states) == {StageState.READY}
    assert arena_tensors(plan, memory) == reference(made.root)
    assert source.verified_bytes == plan.read_bytes
    # Nothing was read that the plan does not want, hence no rest of a piece.
    assert sum(length for _, _, length in counting.reads) == plan.read_bytes
    made.source.close()


@pytest.mark.parametrize("times", [1, 2])
def test_a_fault_in_the_last_stage(tmp_path: Path, times: int) -> None:
    made = Model(layered(tmp_path / "m", nbytes=300_000))
    head = made.checkpoint.tensors["lm_head.weight"]
    source, _ = made.faulty({(head.shard, head.offset + head.nbytes - 1): times})
    stages: list[int] = []
    plan, memory, states, error = stream(made.checkpoint, source, "file", stages.append)
    last = len(plan.stages) - 1
    if times == 1:
        assert error is None
        assert arena_tensors(plan, memory) == reference(made.root)
        assert source.mended_pieces == 1
    else:
        assert isinstance(error, SourceCorrupt)
        assert "tensor 'lm_head.weight'" in str(error.where)
        assert states[last] is StageState.FAILED
        assert last not in stages
    made.source.close()


# -- mapped -----------------------------------------------------------------------------------


def test_a_mapped_checkpoint(model: Model) -> None:
    views = [memoryview(data) for data in model.data]
    total = sum(t.nbytes for t in model.checkpoint.tensors.values())
    assert check_mapped(views, model.seal, model.checkpoint) == total
    left = iter([False, False, True])
    checked = check_mapped(views, model.seal, model.checkpoint, cancelled=lambda: next(left))
    assert checked == 2 * MIB - model.checkpoint.shards[0].data_offset


def test_a_fault_in_a_mapped_checkpoint(model: Model) -> None:
    for shard, at in edges_of_pieces(model):
        copies = [bytearray(data) for data in model.data]
        copies[shard][at] ^= 1
        with pytest.raises(SourceCorrupt) as caught:
            check_mapped([memoryview(copy) for copy in copies], model.seal, model.checkpoint)
        assert str(caught.value.where).startswith(model.checkpoint.shards[shard].uri)
