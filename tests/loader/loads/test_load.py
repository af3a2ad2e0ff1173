from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.arena import Reservation
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.devices import open_device
from coldframe.loader.devices.base import Arena, Landing
from coldframe.loader.errors import (
    ColdframeError,
    DeviceError,
    ReplicaError,
    SourceChanged,
    SourceCorrupt,
)
from coldframe.loader.loads.base import LoadEvents
from coldframe.loader.loads.load import Load
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.memory_service.board import StageState
from coldframe.loader.sources.base import SEALED
from coldframe.loader.sources.file import FileSource
from coldframe.loader.timeline import Recorder
from tests.loader.weights import arena_tensors, evict, layered, reference, sealed, shard_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return layered(tmp_path / "m")


@pytest.fixture(autouse=True)
def lease_signal() -> Iterator[None]:
    before = signal.signal(signal.SIGIO, lambda *_: None)
    yield
    signal.signal(signal.SIGIO, before)


class Watched:
    """A load and what it has said; `on_stage` is called with each stage by whoever brought it."""

    def __init__(
        self,
        root: Path | str,
        files: Path | None = None,
        on_stage: Callable[[int], None] = lambda stage: None,
        **options: Any,
    ) -> None:
        self.said: list[object] = []
        self.ends: list[ColdframeError | None] = []
        self._on_stage = on_stage
        self.load = Load(
            LoadOptions(str(root), **options),
            open_device("cpu"),
            Recorder("memory"),
            LoadEvents(
                on_files=lambda path: self.said.append(f"files in {path}"),
                on_plan=lambda: self.said.append("plan"),
                on_stage=self._stage,
                on_end=self.ends.append,
            ),
            files_dir=str(files or Path(root, "unused")),
        )

    def _stage(self, stage: int) -> None:
        self.said.append(stage)
        self._on_stage(stage)

    def tensors(self) -> dict[str, bytes]:
        """What a worker sees that maps the segments."""
        arena = Reservation(self.load.weights.plan.arena_bytes)
        arena.attach(self.load.weights.segments)
        found = arena_tensors(self.load.weights.plan, arena.view())
        arena.close()
        return found

    def wait(self) -> None:
        """Until the load has ended."""
        deadline = time.monotonic() + 20
        while not self.ends:
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.005)

    def close(self) -> None:
        self.load.close()
        self.load.board.close()


def test_options_travel() -> None:
    options = LoadOptions("/m", ("/n",), copy=True, throttle=1e6, threads=3)
    assert LoadOptions.from_wire(json.loads(json.dumps(options.to_wire()))) == options


def test_a_mapped_load_is_ready_and_closes_whole(model: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    watched = Watched(model)
    watched.load.run()
    watched.wait()
    stages = [stage.index for stage in watched.load.weights.plan.stages]
    assert watched.load.weights.mode == "mapped"
    assert watched.said[:2] == [f"files in {model}", "plan"]
    assert sorted(watched.said[2:]) == stages  # type: ignore[type-var]
    assert watched.ends == [None]
    assert {watched.load.board.state(stage) for stage in stages} == {StageState.READY}
    assert watched.tensors() == reference(model)
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_what_the_page_cache_has_dropped_is_read_before_it_is_given_out(tmp_path: Path) -> None:
    root = layered(tmp_path / "m", nbytes=200_000, shards=1)
    (path,) = shard_files(root)
    size = path.stat().st_size
    evict(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.pread(file.fileno(), int(0.95 * size), 0)
        assert 0.9 * size < cached_bytes(file.fileno(), 0, size) < size
        watched = Watched(root)
        watched.load.run()
        watched.wait()
        assert watched.load.weights.mode == "mapped"
        assert cached_bytes(file.fileno(), 0, size) == size
    assert watched.tensors() == reference(root)
    watched.close()


def test_moved_out_weights_are_the_same_at_the_same_places(model: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    expected = reference(model)
    watched = Watched(model)
    watched.load.run()
    (segment,) = watched.load.weights.move_out()
    assert (segment.offset, segment.writable) == (0, False)
    assert watched.load.weights.mode == "mapped"
    watched.load.weights.adopt([segment])
    assert watched.load.weights.mode == "copied"
    watched.load.weights.let_go()
    for path in shard_files(model):
        os.truncate(path, 0)
    assert watched.tensors() == expected
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize("flipped", [False, True])
def test_what_a_writer_interrupted_is_verified_where_it_was_moved_to(
    flipped: bool, model: Path
) -> None:
    path = shard_files(sealed(model))[1]
    if flipped:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(bytes([path.read_bytes()[-1] ^ 1]))
    watched = Watched(model)
    watched.load.run()
    watched.wait()
    with pytest.raises(BlockingIOError):
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    watched.load.weights.verify()  # gives way at once
    assert watched.load.weights.verified != SEALED
    watched.load.weights.adopt(watched.load.weights.move_out())
    watched.load.weights.let_go()
    assert watched.load.weights.must_verify
    if flipped:
        with pytest.raises(SourceCorrupt, match="bytes"):
            watched.load.weights.verify()
    else:
        watched.load.weights.verify()
        assert watched.load.weights.verified == SEALED
        assert not watched.load.weights.must_verify
    watched.close()


def test_what_is_moved_out_and_laid_out_anew_is_verified_before(model: Path) -> None:
    path = shard_files(sealed(model))[1]
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([path.read_bytes()[-1] ^ 1]))
    watched = Watched(model)
    watched.load.run()
    watched.wait()
    watched.load.weights.adopt(watched.load.weights.move_out())
    with pytest.raises(SourceCorrupt):
        watched.load.weights.realign()
    watched.close()


@pytest.mark.parametrize("what", ["move_out", "verify", "realign"])
def test_nobody_touches_weights_of_a_load_that_is_closed(what: str, model: Path) -> None:
    watched = Watched(sealed(model))
    watched.load.run()
    watched.wait()
    watched.close()
    with pytest.raises(ReplicaError, match="closed"):
        getattr(watched.load.weights, what)()


def test_closing_waits_until_weights_are_no_longer_copied(model: Path) -> None:
    watched = Watched(model, copy=True)
    watched.load.run()
    watched.wait()
    started, ended = threading.Event(), threading.Event()
    check = watched.load.weights._check_open

    def slow() -> None:
        started.set()
        time.sleep(0.01)
        check()

    watched.load.weights._check_open = slow  # type: ignore[method-assign]

    def realign() -> None:
        with pytest.raises(ReplicaError, match="closed"):
            watched.load.weights.realign()
        ended.set()

    thread = threading.Thread(target=realign)
    thread.start()
    assert started.wait(10)
    watched.close()
    assert ended.wait(10)
    thread.join()


def test_a_writer_that_got_in_before_the_copy_was_done_is_noticed(model: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    watched = Watched(model)
    watched.load.run()
    # As the kernel does when the time for breaking a lease is over.
    watched.load.weights.let_go()
    path = shard_files(model)[1]
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(SourceChanged) as caught:
        watched.load.weights.move_out()
    assert caught.value.where == str(path)
    assert watched.load.weights.mode == "mapped"
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_what_changed_before_the_lease_is_noticed_and_the_lease_let_go(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard_files(model)[1]
    take_lease = FileSource.take_lease

    def take_lease_late(source: FileSource) -> str | None:
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        return take_lease(source)

    monkeypatch.setattr(FileSource, "take_lease", take_lease_late)
    watched = Watched(model)
    with pytest.raises(SourceChanged):
        watched.load.run()
    assert "plan" not in watched.said
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # nothing holds a writer back
    watched.close()


class FullDevice:
    name = "full"

    def available(self) -> int:
        return 0

    layout = None

    def arena(self, purpose: str, nbytes: int, base: int | None = None, *, now: bool) -> Arena:
        raise DeviceError("full")

    def land(self, *_: object, **__: object) -> Landing:
        raise DeviceError("full")


def test_without_memory_for_a_copy_the_mapping_stays(model: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    watched = Watched(model)
    watched.load.run()
    watched.load.weights._device = FullDevice()
    with pytest.raises(DeviceError, match="full"):
        watched.load.weights.move_out()
    assert watched.tensors() == reference(model)
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_load_that_failed_closes_whole(model: Path) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    watched = Watched(model, copy=True)
    watched.load._device = FullDevice()
    with pytest.raises(DeviceError, match="full"):
        watched.load.run()
    assert watched.ends == []
    assert "plan" not in watched.said
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == fds
