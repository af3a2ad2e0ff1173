"""Checkpoints on their way into a GPU's memory, by the same load as into the host's."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.arena import Segment
from coldframe.loader.checkpoints.plan import Layout
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.errors import (
    ColdframeError,
    DeviceError,
    DeviceFull,
    DeviceLost,
    NoDevice,
    SourceError,
)
from coldframe.loader.loads.base import LoadEvents
from coldframe.loader.loads.load import Load
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.loads.source import SourceOpener
from coldframe.loader.memory_service.board import StageState
from coldframe.loader.sources.base import SEALED
from coldframe.loader.timeline import Recorder
from tests.loader.devices.emulator import LOST, Emulator
from tests.loader.weights import arena_tensors, layered, reference, sealed, shard_files


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.002)


class Loading:
    """A load into an emulated GPU, and what it has said."""

    def __init__(self, emulator: Emulator, model: str, files: Path, **options: Any) -> None:
        self.device = CudaDevice(0, emulator)
        self.device.start()
        self.planned = False
        self.stages: list[int] = []
        self.ends: list[ColdframeError | None] = []
        self.kept: list[str | None] = []
        self.recorder = Recorder("memory")
        self.load = Load(
            LoadOptions(model, device="cuda:0", **options),
            self.device,
            self.recorder,
            LoadEvents(
                on_files=lambda path: None,
                on_plan=self._plan,
                on_stage=self.stages.append,
                on_end=self.ends.append,
                on_kept=self.kept.append,
            ),
            files_dir=str(files),
        )

    def _plan(self) -> None:
        assert self.load.weights.segments
        assert not self.stages
        self.planned = True

    def run(self) -> ColdframeError | None:
        """All of it; why it failed, or None."""
        self.load.run()
        until(lambda: bool(self.ends))
        (error,) = self.ends
        return error

    def tensors(self) -> dict[str, bytes]:
        """What a worker sees that maps the segments."""
        plan = self.load.weights.plan
        found = self.device.mapping(plan.arena_bytes)
        found.attach(self.load.weights.segments)
        memory = memoryview(ctypes.string_at(found.address, plan.arena_bytes))
        found.close()
        return arena_tensors(plan, memory)

    @property
    def states(self) -> set[StageState]:
        return {self.load.board.state(stage.index) for stage in self.load.weights.plan.stages}

    def close(self) -> None:
        self.load.close()
        if hasattr(self.load, "board"):
            self.load.board.close()
        self.device.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "m", nbytes=300_000)


@pytest.fixture
def loading(emulator: Emulator, tmp_path: Path) -> Iterator[Callable[..., Loading]]:
    made: list[Loading] = []

    def make(model: object, **options: Any) -> Loading:
        files = tmp_path / f"files-{len(made)}"
        made.append(Loading(emulator, str(model), files, **options))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()


@pytest.mark.parametrize("seal", [False, True])
def test_a_checkpoint_lands_stage_by_stage(
    model: Path, loading: Callable[..., Loading], emulator: Emulator, seal: bool
) -> None:
    if seal:
        sealed(model)
    emulator.delay = 0.001
    one = loading(model)
    assert one.run() is None
    assert one.planned
    assert sorted(one.stages) == [stage.index for stage in one.load.weights.plan.stages]
    assert one.states == {StageState.READY}
    assert one.tensors() == reference(model)
    # In the page cache or not: nothing is mapped, and q, k and v lie behind one another.
    assert (one.load.weights.mode, one.load.weights.plan.layout) == ("copied", Layout.ALIGNED)
    assert (one.load.weights.verified == SEALED) is seal
    (span,) = [span for span in one.recorder.drain() if span.name == "weight_read"]
    assert "from locked memory" in (span.note or "")
    one.load.landed()
    assert not [what for what in emulator.left() if "locked" in what or "stream" in what]


def test_nothing_is_ready_before_it_is_there(
    model: Path, loading: Callable[..., Loading], emulator: Emulator
) -> None:
    emulator.hold()
    one = loading(model)
    one.load.run()
    until(lambda: emulator.calls["cuMemcpyHtoDAsync"] > 0)
    assert (one.stages, one.ends) == ([], [])
    emulator.go.set()
    until(lambda: one.ends == [None])
    assert one.tensors() == reference(model)


def test_reads_begin_before_the_gpu_is_up(
    model: Path, loading: Callable[..., Loading], emulator: Emulator
) -> None:
    may_start, start = threading.Event(), emulator.cuInit

    def slowly(Flags: int) -> object:
        assert may_start.wait(60)
        return start(Flags)

    emulator.cuInit = slowly  # type: ignore[method-assign]
    one = loading(model)
    one.load.run()
    # All of it: in buffers of the host.
    stream = one.load._stream
    assert stream is not None
    until(lambda: not stream._readers)
    assert stream._under_way > 2
    assert not one.planned
    for path in shard_files(model):
        path.rename(path.with_suffix(".read"))
    may_start.set()
    until(lambda: one.ends == [None])
    for path in model.glob("*.read"):
        path.rename(path.with_suffix(".safetensors"))
    assert one.tensors() == reference(model)


def test_a_limit_on_the_rate_holds_back_what_has_landed(
    model: Path, loading: Callable[..., Loading]
) -> None:
    one = loading(model, throttle=50e6)
    assert one.run() is None
    assert one.tensors() == reference(model)


def test_without_a_driver_it_ends_with_the_reason(
    model: Path, loading: Callable[..., Loading], emulator: Emulator
) -> None:
    emulator.library = False
    one = loading(model)
    assert isinstance(one.run(), NoDevice)
    assert not one.planned
    assert one.states == {StageState.FAILED}


def test_a_model_larger_than_the_gpu(
    model: Path, loading: Callable[..., Loading], emulator: Emulator
) -> None:
    emulator.memory = 2 << 20
    one = loading(model)
    error = one.run()
    assert isinstance(error, DeviceFull)
    assert "bytes available" in str(error)


@pytest.mark.parametrize("nth", [1, 3])
def test_a_copy_that_fails_ends_it(
    model: Path, loading: Callable[..., Loading], emulator: Emulator, nth: int
) -> None:
    emulator.fail_copy(nth)
    one = loading(model)
    error = one.run()
    assert isinstance(error, DeviceLost)
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(error)
    assert StageState.FAILED in one.states


def test_a_gpu_lost_in_mid_load(
    model: Path, loading: Callable[..., Loading], emulator: Emulator
) -> None:
    emulator.hold()
    one = loading(model)
    one.load.run()
    until(lambda: emulator.calls["cuMemcpyHtoDAsync"] > 0)
    emulator.lose()
    until(lambda: bool(one.ends))
    assert isinstance(one.ends[0], DeviceLost)
    assert LOST in str(one.ends[0])


@pytest.mark.parametrize(
    "call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuStreamCreate", "cuEventCreate"]
)
def test_a_driver_that_refuses(
    model: Path, loading: Callable[..., Loading], emulator: Emulator, call: str
) -> None:
    emulator.fail(call)
    one = loading(model)
    error = one.run()
    assert isinstance(error, DeviceError)
    assert f"{call}" in str(error)
    assert "CUDA_ERROR_INVALID_VALUE" in str(error)


def test_a_file_that_ends_early(
    model: Path, loading: Callable[..., Loading], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = loading(model)
    opened = SourceOpener.open

    def cut(*arguments: Any) -> Any:
        source = opened(*arguments)
        shard_files(model)[1].write_bytes(b"short")
        return source

    monkeypatch.setattr(SourceOpener, "open", cut)
    assert isinstance(one.run(), SourceError)


def test_it_can_be_closed_at_any_moment(
    model: Path, loading: Callable[..., Loading], emulator: Emulator
) -> None:
    emulator.delay = 0.002
    for copies in (0, 1, 3, 6):
        before = emulator.calls["cuMemcpyHtoDAsync"]
        one = loading(model)
        one.load.run()
        until(lambda: emulator.calls["cuMemcpyHtoDAsync"] >= before + copies)  # noqa: B023
        one.load.close()
        assert [what for what in emulator.left() if "context" not in what] == []


def test_files_as_they_are_do_not_lie_well_in_it(
    model: Path, loading: Callable[..., Loading]
) -> None:
    one = loading(model, layout="file")
    with pytest.raises(DeviceError, match="cannot lie like that"):
        one.load.run()


def test_peers_get_bytes_out_of_it_and_the_cache_is_written_beside_it(
    model: Path, loading: Callable[..., Loading], tmp_path: Path
) -> None:
    first = loading(model, serve_peers="127.0.0.1:0")
    assert first.run() is None
    second = loading(
        f"peer://{first.load.peers_at}", cache=str(tmp_path / "c"), cache_bytes=1 << 30
    )
    assert second.run() is None
    until(lambda: bool(second.kept))
    assert second.kept == [None]
    assert first.tensors() == second.tensors() == reference(model)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "c").rglob("*.safetensors")}
    assert kept == {path.name: path.read_bytes() for path in shard_files(model)}


def test_segments_are_the_gpus(model: Path, loading: Callable[..., Loading]) -> None:
    one = loading(model)
    assert one.run() is None
    (segment,) = one.load.weights.segments
    assert isinstance(segment, Segment)
    assert (segment.offset, segment.writable) == (0, False)
    assert segment.length >= one.load.weights.plan.arena_bytes
