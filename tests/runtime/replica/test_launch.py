from __future__ import annotations

import os
from pathlib import Path

import pytest

from coldframe.loader.errors import PlatformError
from coldframe.loader.process import Child, spawn_python
from coldframe.loader.timeline import Recorder
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions


def test_it_is_closed_once(no_leaks: Path) -> None:
    launch = Launch(ReplicaOptions("m", hold_load=True, run_dir=str(no_leaks)), Recorder("front"))
    launch.close()
    # Somebody else's now, with the same numbers.
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    launch.close()
    for fd in fds:
        os.close(fd)


def test_a_worker_that_cannot_be_started_is_the_error(
    no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PlatformError("no process is left")

    monkeypatch.setattr("coldframe.runtime.replica.launch.spawn_python", refuse)
    with pytest.raises(PlatformError, match="no process is left"):
        Replica(ReplicaOptions("m", hold_load=True, run_dir=str(no_leaks)))


def test_a_worker_compiles_no_kernels(no_leaks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torch's own ones, where a compiler is installed, nor cuDNN's plans for attention."""
    given: list[dict[str, str]] = []

    def start(code: str, arguments: list[str], fd: int, environment: dict[str, str]) -> Child:
        given.append(environment)
        raise PlatformError("none is needed here")

    monkeypatch.setattr("coldframe.runtime.replica.launch.spawn_python", start)
    launch = Launch(ReplicaOptions("m", hold_load=True, run_dir=str(no_leaks)), Recorder("front"))
    with pytest.raises(PlatformError, match="none is needed"):
        launch.start_worker("decode")
    launch.close()
    names = ("TORCH_DISABLE_NATIVE_JIT", "TORCH_CUDNN_SDPA_DEPRIORITIZED")
    assert [given[0][name] for name in names] == ["1", "1"]


def test_an_engine_keeps_off_the_cores_until_the_first_byte_is_asked_for(
    no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def refuse(code: str, *_: object, **__: object) -> Child:
        order.append("vllm" if "vllm" in code else "native")
        if order[-1] == "vllm":
            raise PlatformError("none is needed here")
        return spawn_python("input()", (), 0, {})

    def wait(*_: object) -> bool:
        order.append("wait")
        return True

    monkeypatch.setattr("coldframe.runtime.replica.launch.spawn_python", refuse)
    monkeypatch.setattr("coldframe.loader.wire.Channel.wait_readable", wait)
    alone = VllmOptions(alone=True)
    for hold, expected in ((True, ["native", "vllm"]), (False, ["native", "wait", "vllm"])):
        order.clear()
        options = ReplicaOptions(
            "/none", decode=0, vllm=alone, hold_load=hold, run_dir=str(no_leaks)
        )
        launch = Launch(options, Recorder("front"))
        with pytest.raises(PlatformError, match="none is needed"):
            launch.start_workers()
        assert order == expected
