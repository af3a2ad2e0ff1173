"""Images for the next start that are made beside a replica: when they wait, and give way."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from coldframe.loader.timeline import Recorder, Span, now
from coldframe.runtime.compiled import compiling
from coldframe.runtime.compiled.compiling import Compiling
from coldframe.runtime.compiled.notes import EAGERLY, could_be_compiled, eager_notice
from coldframe.runtime.endpoint.supervisor import Supervisor
from coldframe.runtime.frozen import creating
from coldframe.runtime.gateway.logs import Log
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.scaling.policies import FixedKeepAlive
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.manifest import EAGER_FOR_NOW
from coldframe.snapshot.store import open_store

DemoModels = Callable[..., Path]


@pytest.fixture
def model(demo_model: DemoModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that is worth compiling, and an empty cache."""
    monkeypatch.setattr(compiling, "LEAST_BYTES", 0)
    monkeypatch.setattr(creating, "_QUIET_S", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return demo_model("llama", "float32")


def supervised(model: Path, runs: Path, store: Path, policy: FixedKeepAlive) -> Supervisor:
    snapshot = SnapshotOptions("auto", str(store), create=True)
    options = ReplicaOptions(model=str(model), run_dir=str(runs), snapshot=snapshot)
    log = Log(process="front")
    return Supervisor(options, policy, Recorder("front"), log, Loop(), None, now())


def until(supervisor: Supervisor, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, f"it never came: {supervisor.state}"
        supervisor.loop.poll(min(0.05, supervisor.wait_s))
        supervisor.tick()
        supervisor.step()


def close(supervisor: Supervisor) -> None:
    supervisor.close()
    assert not supervisor.loop.selector.get_map()
    supervisor.loop.close()


def compilers() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [
        c for c in children if any("runtime.compiled.compiler" in part for part in command_of(c))
    ]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has ended since it was found
        return []


def left_in_cache(tmp_path: Path) -> list[Path]:
    root = tmp_path / "cache/coldframe/compiled"
    return [path for path in root.glob("*") if path.name != "lock"]


@pytest.mark.heavy
@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize("way", ["room", "idle", "parked"])
def test_who_compiles_holds_no_room(
    model: Path, criu: Criu, no_leaks: Path, tmp_path: Path, way: str
) -> None:
    idle_s = None if way == "room" else 1.0
    policy = FixedKeepAlive(idle_s, None if way == "parked" else 0.0)
    supervisor = supervised(model, no_leaks, tmp_path / "store", policy)
    try:
        until(supervisor, lambda: bool(compilers()))
        if way == "room":
            assert supervisor.can_go
            supervisor.make_room()
        until(supervisor, lambda: supervisor.state in ("zero", "parked"))
        assert supervisor.state == ("parked" if way == "parked" else "zero")
        assert compilers() == []
        assert left_in_cache(tmp_path) == []
    finally:
        close(supervisor)


@pytest.mark.heavy
def test_what_is_urgent_takes_what_there_is_and_is_bettered_once_it_can_be(
    model: Path,
    criu: Criu,
    no_leaks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "store"

    def images() -> list[str]:
        return [image.decode_steps for image in open_store(str(store)).manifests()[0]]

    monkeypatch.setattr(creating, "_TOO_MANY", 1)
    supervisor = supervised(model, no_leaks, store, FixedKeepAlive())
    try:
        until(supervisor, lambda: bool(images()))
        assert not (tmp_path / "cache").exists()  # nothing was compiled
    finally:
        close(supervisor)
    (steps,) = images()
    assert steps.startswith(EAGER_FOR_NOW)
    # The next one has an image, and compiles all the same; for others it goes at once.
    supervisor = supervised(model, no_leaks, store, FixedKeepAlive())
    try:
        until(supervisor, lambda: bool(compilers()))
        assert supervisor.can_go
        supervisor.make_room()
        until(supervisor, lambda: supervisor.state == "zero")
        assert compilers() == []
        supervisor.wake()
        until(supervisor, lambda: supervisor.state == "warm")
        for _ in range(10):
            supervisor.step()
        assert compilers() == []  # once is enough
    finally:
        close(supervisor)
    assert images() == [steps]


def test_which_code_could_still_be_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = ModelFacts(str(model))
    assert could_be_compiled(Compiling(facts, 2, str(tmp_path), 0).order)
    monkeypatch.setattr(compiling, "memory_available", lambda: 1 << 30)
    assert could_be_compiled(Compiling(facts, 2, str(tmp_path), 60).order)
    monkeypatch.setattr(compiling, "LEAST_BYTES", 1 << 40)
    assert not could_be_compiled(Compiling(facts, 2, str(tmp_path), 60).order)
    assert not could_be_compiled({"folder": "/there", "why": "compiled"})


def test_who_has_an_answer_is_told_once_why_steps_were_eager() -> None:
    threads = Span("graph_restore", 1, 2, "decode-0", f"{EAGERLY}compiled for threads 2, here 1")
    assert eager_notice([threads, threads], "m", 1) == (
        f"{EAGERLY}compiled for threads 2, here 1; "
        "`coldframe snapshot create m --threads 1` makes an image for that"
    )
    other = Span("graph_restore", 1, 2, "decode-0", f"{EAGERLY}it broke")
    assert eager_notice([other], "m", 1) == f"{EAGERLY}it broke"
    fine = Span("graph_restore", 1, 2, "decode-0", "compiled; 1.52x (1 sequence)")
    assert eager_notice([fine], "m", 1) is None
