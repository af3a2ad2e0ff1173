from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices.cpu import HostLanding
from coldframe.loader.errors import ColdframeError, SourceChanged, SourceError
from coldframe.loader.loads.placing import Placer
from coldframe.loader.loads.stream import Stream
from coldframe.loader.memory_service.board import Board, StageState
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.file import FileSource
from coldframe.loader.throttle import Throttle
from coldframe.loader.timeline import Recorder
from tests.loader.checkpoints.written import tensor, write_model
from tests.loader.weights import arena_tensors, layered, reference, shard_files
from tests.support import no_threads_left


class Run:
    """A stream into plain memory, and what it said."""

    def __init__(
        self,
        root: Path,
        *,
        threads: int = 2,
        rate: float | None = None,
        wrap: Callable[[Source], Source] = lambda source: source,
        on_stage: Callable[[int], None] = lambda stage: None,
    ) -> None:
        checkpoint = Checkpoint.open(root)
        self.plan = Plan.build(checkpoint)
        self.source = FileSource(checkpoint.shards)
        self.memory = memoryview(bytearray(self.plan.arena_bytes))
        self.board = Board([stage.nbytes for stage in self.plan.stages])
        self.recorder = Recorder("memory")
        self.stages: list[int] = []
        self.ends: list[ColdframeError | None] = []
        self._on_stage = on_stage
        self.ended = threading.Event()
        self.placed = wrap(self.source)
        self.stream = Stream(
            self.plan,
            HostLanding(Placer(self.placed, self.memory)).fetch,
            self.board,
            finish=self.placed.finish,
            on_stage=self._stage,
            on_end=self._end,
            recorder=self.recorder,
            threads=threads,
            throttle=None if rate is None else Throttle(rate),
        )

    def _stage(self, stage: int) -> None:
        self.stages.append(stage)
        self._on_stage(stage)

    def _end(self, error: ColdframeError | None) -> None:
        self.ends.append(error)
        self.ended.set()

    def finish(self) -> ColdframeError | None:
        self.stream.start()
        assert self.ended.wait(30)
        (error,) = self.ends
        return error

    @property
    def states(self) -> list[StageState]:
        return [self.board.state(stage.index) for stage in self.plan.stages]

    def close(self) -> None:
        self.stream.cancel()
        self.source.close()
        self.board.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Run]]:
    fds = len(os.listdir("/proc/self/fd"))
    runs: list[Run] = []

    def make(root: Path, **options: object) -> Run:
        runs.append(Run(root, **options))  # type: ignore[arg-type]
        return runs[-1]

    with no_threads_left():
        yield make
        for run in runs:
            run.close()
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_tensor_is_what_safetensors_reads(
    threads: int, tmp_path: Path, start: Callable[..., Run]
) -> None:
    # Larger than a chunk of 8 MiB, so that threads share a stage.
    root = layered(tmp_path / "m", layers=2, nbytes=5_000_001)
    run = start(root, threads=threads)
    assert run.finish() is None
    assert arena_tensors(run.plan, run.memory) == reference(root)
    assert sorted(run.stages) == [stage.index for stage in run.plan.stages]
    assert set(run.states) == {StageState.READY}
    assert run.board.progress.done == run.board.progress.total == run.plan.read_bytes
    names = [span.name for span in run.recorder.drain()]
    assert sorted(names) == sorted(
        ["weight_read", *(f"stage_ready[{stage.index}]" for stage in run.plan.stages)]
    )


def test_one_reader_brings_the_stages_in_their_order(
    tmp_path: Path, start: Callable[..., Run]
) -> None:
    run = start(layered(tmp_path / "m", layers=6), threads=1)
    assert run.finish() is None
    assert run.stages == [stage.index for stage in run.plan.stages]


class Asked:
    """A source that notes what is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.offsets: list[tuple[int, int, int]] = []
        self.lock = threading.Lock()

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        with self.lock:
            self.offsets.append((shard, offset, sum(map(len, parts))))
        self.source.read_into(shard, offset, parts)

    def finish(self) -> None:
        self.source.finish()

    def close(self) -> None:
        self.source.close()


def test_each_planned_byte_is_read_once_in_bounded_pieces(
    tmp_path: Path, start: Callable[..., Run]
) -> None:
    asked: list[Asked] = []

    def wrap(source: Source) -> Source:
        asked.append(Asked(source))
        return asked[-1]

    root = write_model(
        tmp_path / "m", [[("model.layers.0.w", "U8", [20_000_000], bytes(20_000_000))]]
    )
    run = start(root, threads=3, wrap=wrap)
    assert run.finish() is None
    (extent,) = run.plan.stages[1].extents
    pieces = sorted(asked[0].offsets)
    assert max(length for _, _, length in pieces) <= 8 << 20
    position = extent.file_offset
    for _, offset, length in pieces:
        assert offset == position
        position += length
    assert position == extent.file_offset + extent.length


def test_a_stage_is_given_out_after_its_bytes_are_in(
    tmp_path: Path, start: Callable[..., Run]
) -> None:
    root = layered(tmp_path / "m", layers=4, nbytes=200_000)
    expected = reference(root)
    wrong: list[str] = []

    def look(stage: int) -> None:
        assert run.board.state(stage) is StageState.READY
        for place in run.plan.placements.values():
            there = run.memory[place.arena_offset : place.arena_offset + place.nbytes]
            if place.stage == stage and bytes(there) != expected[place.name]:
                wrong.append(place.name)

    run = start(root, threads=4, on_stage=look)
    assert run.finish() is None
    assert wrong == []


def test_a_stage_without_bytes_is_ready_at_once(tmp_path: Path, start: Callable[..., Run]) -> None:
    root = write_model(tmp_path / "m", [[tensor("model.layers.0.w", 100)]])
    run = start(root)
    assert run.finish() is None
    assert run.plan.stages[0].nbytes == run.plan.stages[-1].nbytes == 0
    assert sorted(run.stages) == [0, 1, 2]
    assert set(run.states) == {StageState.READY}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_throttle_is_a_limit_at_every_moment(
    threads: int, tmp_path: Path, start: Callable[..., Run]
) -> None:
    rate = 4e6
    run = start(layered(tmp_path / "m", layers=4, nbytes=150_000), rate=rate, threads=threads)
    assert run.finish() is None
    ready = {span.name: span for span in run.recorder.drain()}
    began = ready["weight_read"].start_ns
    done = 0
    for stage in run.plan.stages:
        done += stage.nbytes
        seconds = (ready[f"stage_ready[{stage.index}]"].start_ns - began) / 1e9
        # Stages come in order, except for what is in flight; a link gives nothing ahead of time.
        assert done / rate <= seconds * 1.05 + threads * (64 << 10) / rate


def test_a_throttled_link_is_booked_without_gaps_or_gifts() -> None:
    throttle = Throttle(1000.0)
    first = throttle.book(100)
    assert throttle.book(100) == pytest.approx(first + 0.1)
    assert throttle.book(0) == pytest.approx(first + 0.1)
    idle = Throttle(1e9)
    early = idle.book(1)
    threading.Event().wait(0.1)
    # After a pause only its last milliseconds can be caught up.
    assert idle.book(1) >= early + 0.1 - Throttle._SLACK_S - 0.001


class Held(Asked):
    """A source that gives what is `behind` only once it was `let_go`, however busy the machine."""

    def __init__(self, source: Source, behind: Callable[[int, int], bool]) -> None:
        super().__init__(source)
        self.behind = behind
        self.let_go = threading.Event()

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        if self.behind(shard, offset + sum(map(len, parts))):
            assert self.let_go.wait(20)
        super().read_into(shard, offset, parts)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_file_that_is_cut_meanwhile(
    threads: int, tmp_path: Path, start: Callable[..., Run]
) -> None:
    root = layered(tmp_path / "m", layers=4, nbytes=100_000, shards=1)
    path = shard_files(root)[0]
    size, expected = path.stat().st_size, reference(root)

    def cut(stage: int) -> None:
        if stage == 0:
            os.truncate(path, size // 2)
            run.placed.let_go.set()

    run = start(
        root,
        threads=threads,
        wrap=lambda source: Held(source, lambda _, end: end > size // 2),
        on_stage=cut,
    )
    error = run.finish()
    assert type(error) is SourceChanged
    assert error.where == str(path)
    assert error.expected == f"{size} bytes, unchanged"
    assert error.got is not None
    at = int(error.got.removeprefix("byte "))
    assert at == size // 2 if threads == 1 else at >= size // 2  # of several, the first to fail
    assert run.states[0] is StageState.READY
    assert run.states[-1] is StageState.FAILED
    assert StageState.PENDING not in run.states
    ready = [stage for stage, state in enumerate(run.states) if state is StageState.READY]
    assert sorted(run.stages) == ready
    there = arena_tensors(run.plan, run.memory)
    for place in run.plan.placements.values():
        if place.stage in ready:
            assert there[place.name] == expected[place.name]


def test_a_file_that_is_modified_in_place_is_never_given_out_as_a_whole(
    tmp_path: Path, start: Callable[..., Run]
) -> None:
    root = layered(tmp_path / "m", layers=2, nbytes=100_000)
    path = shard_files(root)[1]

    def modify(stage: int) -> None:
        if stage == 0:
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
            run.placed.let_go.set()

    run = start(
        root,
        wrap=lambda source: Held(source, lambda shard, _: shard == 1),
        on_stage=modify,
    )
    error = run.finish()
    assert type(error) is SourceChanged
    assert error.what == "a weight file was modified while it was loaded"
    assert error.where == str(path)
    # Whichever is complete last; stages are taken in order: no forward pass gets past it.
    missing = {stage.index for stage in run.plan.stages} - set(run.stages)
    assert missing
    assert {run.states[stage] for stage in missing} == {StageState.FAILED}
    assert run.states[0] is StageState.READY


def test_a_file_that_is_replaced_is_loaded_as_it_was(
    tmp_path: Path, start: Callable[..., Run]
) -> None:
    root = layered(tmp_path / "m", layers=2, nbytes=100_000)
    expected = reference(root)
    path = shard_files(root)[1]

    def replace(stage: int) -> None:
        if stage == 0:
            path.with_suffix(".new").write_bytes(b"something else")
            path.with_suffix(".new").rename(path)

    run = start(root, rate=5e6, on_stage=replace)
    assert run.finish() is None
    assert arena_tensors(run.plan, run.memory) == expected


class Broken(Asked):
    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        raise ZeroDivisionError("unexpected")


def test_whatever_ends_a_reader_is_reported_once(tmp_path: Path, start: Callable[..., Run]) -> None:
    run = start(layered(tmp_path / "m"), threads=3, wrap=Broken)
    error = run.finish()
    assert type(error) is SourceError
    assert error.got == "ZeroDivisionError('unexpected')"
    assert set(run.states) == {StageState.FAILED}
    assert run.stages == []


def test_a_stage_is_either_given_out_or_has_failed(
    tmp_path: Path, start: Callable[..., Run]
) -> None:
    looked, failing = threading.Event(), threading.Event()

    class Late(Asked):
        """The first chunk comes when another's failure is just being told."""

        def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
            with self.lock:
                first = not self.offsets
                self.offsets.append((shard, offset, 0))
            if not first:
                raise SourceError("the disk is gone")
            assert failing.wait(20)
            self.source.read_into(shard, offset, parts)

    run = start(layered(tmp_path / "m"), wrap=Late)
    state = run.board.state

    def watched(stage: int) -> StageState:
        found = state(stage)
        if stage == 0 and not looked.is_set():
            looked.set()
            failing.set()
            threading.Event().wait(0.05)  # for a thread that would go on meanwhile
        return found

    run.board.state = watched  # type: ignore[method-assign]
    assert type(run.finish()) is SourceError
    failed = [stage for stage, seen in enumerate(run.states) if seen is StageState.FAILED]
    assert not set(failed) & set(run.stages)
    assert len(failed) + len(run.stages) == len(run.plan.stages)


def test_nothing_is_touched_after_a_cancel(tmp_path: Path, start: Callable[..., Run]) -> None:
    first = threading.Event()
    run = start(
        layered(tmp_path / "m", layers=4, nbytes=100_000),
        rate=1e6,
        on_stage=lambda stage: first.set(),
    )
    run.stream.start()
    assert first.wait(20)
    run.stream.cancel()
    assert not [t for t in threading.enumerate() if t.name.startswith("read-")]
    seen, before = list(run.stages), bytes(run.memory)
    threading.Event().wait(0.1)
    assert run.stages == seen
    assert bytes(run.memory) == before
    assert run.ends == []  # that would say that all is in
    assert run.states[-1] is StageState.PENDING
    run.stream.cancel()


def test_a_cancel_before_the_start(tmp_path: Path, start: Callable[..., Run]) -> None:
    run = start(layered(tmp_path / "m"))
    run.stream.cancel()
    assert run.stages == []
    assert run.ends == []
