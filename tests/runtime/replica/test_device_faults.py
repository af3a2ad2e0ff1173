"""A GPU that fails: what a replica makes of it, and what comes of its requests.

There is no GPU here, or none that is used: the driver is really not there, or hidden, or children
say that it has failed them (`gpus`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import (
    ColdframeError,
    DeviceError,
    DeviceFull,
    DeviceLost,
    NoDevice,
    ReplicaError,
)
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.device_faults import DeviceFaults
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.scale_spec import Scale
from tests.runtime.emulated import emulate
from tests.runtime.gpus import break_memory, break_workers
from tests.runtime.helpers import ask, expected, finish, prompt_of, wait_for
from tests.runtime.snapshots import Commands

GPU = ReplicaOptions("m", device="cuda:0")
AUTO = ReplicaOptions("m", device="cuda:0", fall_back=True)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# -- what to do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [NoDevice("n"), DeviceFull("f"), DeviceError("old")])
def test_the_cpu_stands_in_for_a_gpu_that_nobody_has_named(error: DeviceError) -> None:
    told: list[str] = []
    faults = DeviceFaults(told.append)
    way = faults.way_on(error, AUTO, answered=False)
    assert way is not None
    why, options = way
    assert (options.device, options.fall_back, options.device_why) == ("cpu", False, why)
    assert told == [why]
    assert str(error) in why
    assert faults.counts == {"fallback": 1}
    assert faults.absent == isinstance(error, NoDevice)
    assert faults.way_on(error, options, answered=False) is None  # it was the CPU's


def test_whoever_has_named_it_gets_the_error() -> None:
    faults = DeviceFaults(pytest.fail)
    assert faults.way_on(NoDevice("n"), GPU, answered=False) is None
    assert faults.way_on(NoDevice("n"), AUTO, answered=True) is None
    assert faults.way_on(ReplicaError("r"), AUTO, answered=False) is None
    assert faults.counts == {}


def test_who_falls_back_takes_the_workers_along() -> None:
    options = ReplicaOptions(
        "m", device="cuda:0", fall_back=True, prefill=Scale(1, 4, "cuda:0"), hold_load=True
    )
    way = DeviceFaults(lambda _: None).way_on(NoDevice("n"), options, answered=False)
    assert way is not None
    assert way[1].scales == {"prefill": Scale(1, 4), "decode": Scale(1, 1)}
    assert not way[1].hold_load  # what was held before is wanted now


def test_kv_that_only_the_gpu_had_room_for_is_not_asked_of_the_host() -> None:
    for asked, left in ((1 << 50, None), (1 << 20, 1 << 20)):
        options = ReplicaOptions("m", device="cuda:0", fall_back=True, kv_bytes=asked)
        way = DeviceFaults(lambda _: None).way_on(NoDevice("n"), options, answered=False)
        assert way is not None
        assert way[1].kv_bytes == left


@pytest.mark.parametrize("answered", [True, False])
def test_a_gpu_that_is_lost_is_tried_again_but_not_for_ever(answered: bool) -> None:
    clock = Clock()
    faults = DeviceFaults(lambda _: None, clock)
    lost = DeviceLost("l")
    for _ in range(2):
        way = faults.way_on(lost, GPU, answered=answered)
        assert way is not None
        assert way[1].device == "cuda:0"
    assert faults.way_on(lost, GPU, answered=answered) is None
    clock.now += 3600
    assert faults.way_on(lost, GPU, answered=answered) is not None  # that is long ago
    assert faults.counts == {"lost": 4}


def test_one_that_is_lost_again_and_again_is_left_for_the_cpu() -> None:
    faults = DeviceFaults(lambda _: None, Clock())
    ways = [faults.way_on(DeviceLost("l"), AUTO, answered=False) for _ in range(3)]
    assert [way and way[1].device for way in ways] == ["cuda:0", "cuda:0", "cpu"]
    assert faults.counts == {"lost": 3, "fallback": 1}
    assert not faults.absent


# -- real processes -------------------------------------------------------------------------------


def on_gpu(model: Path, runs: Path, **more: object) -> ReplicaOptions:
    return ReplicaOptions(str(model), device="cuda:0", run_dir=str(runs), **more)  # type: ignore[arg-type]


def end_of(replica: Replica) -> ColdframeError:
    wait_for(replica, lambda: replica.error is not None)
    assert replica.error is not None
    return replica.error


def test_a_gpu_that_was_asked_for_is_an_error_where_there_is_none(
    demo_model: Callable[..., Path], commands: Commands
) -> None:
    asked = ("run", demo_model("llama"), "-p", "Once", "--device", "cuda", "--json")
    done = commands.call(*asked, code=1, CUDA_VISIBLE_DEVICES="")
    told = json.loads(done.stdout)
    assert told["error"] == "NoDevice"
    assert "--gpus" in told["hint"]
    assert "NoDevice" in done.stderr


@pytest.mark.heavy
def test_where_nobody_has_named_it_the_answer_comes_from_the_cpu(
    demo_model: Callable[..., Path], no_leaks: Path
) -> None:
    model, prompt, told = demo_model("llama"), prompt_of(30), list[str]()
    with Replica(on_gpu(model, no_leaks, fall_back=True), warn=told.append) as replica:
        wait_for(replica, lambda: replica.known)
        client = ask(replica, prompt, 8)
        finish(replica, client)
        assert client.tokens == expected(model, tuple(prompt), 8)
        assert (replica.facts["device"], replica.facts["device_why"]) == ("cpu", told[0])
        assert told[0].startswith("fell back to the CPU, cuda:0 cannot be used: ")
        assert len(told) == 1
        assert replica.faults.absent


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("DeviceFull", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("DeviceError", "CUDA_ERROR_NOT_SUPPORTED"),
        ("NoDevice", "CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_the_error_has_the_drivers_own_name_for_it(
    kind: str,
    name: str,
    demo_model: Callable[..., Path],
    no_leaks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_memory(monkeypatch, kind, name)
    with Replica(on_gpu(demo_model("llama"), no_leaks, hold_load=True)) as replica:
        replica.start_load()
        error = end_of(replica)
        assert (type(error).__name__, error.got) == (kind, name)
        assert replica.faults.counts == {}


@pytest.mark.heavy
@pytest.mark.parametrize("break_it", [break_memory, break_workers])
def test_a_gpu_that_is_lost_again_and_again_is_the_end(
    break_it: Callable[[pytest.MonkeyPatch, str, str], None],
    demo_model: Callable[..., Path],
    no_leaks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_it(monkeypatch, "DeviceLost", "CUDA_ERROR_LAUNCH_FAILED")
    told: list[str] = []
    with Replica(on_gpu(demo_model("llama"), no_leaks), warn=told.append) as replica:
        error = end_of(replica)
        assert isinstance(error, DeviceLost)
        assert error.got == "CUDA_ERROR_LAUNCH_FAILED"
        assert replica.faults.counts == {"lost": 3}
        assert len(told) == 2
        assert all("cuda:0 was lost" in why for why in told)


@pytest.mark.heavy
@pytest.mark.parametrize("break_it", [break_memory, break_workers])
def test_requests_go_on_behind_a_loss(
    break_it: Callable[[pytest.MonkeyPatch, str, str], None],
    demo_model: Callable[..., Path],
    no_leaks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompt = demo_model("llama"), prompt_of(30)
    options = ReplicaOptions(str(model), run_dir=str(no_leaks))
    with Replica(options) as replica:
        wait_for(replica, lambda: replica.known)
        client = ask(replica, prompt, 300)
        wait_for(replica, lambda: len(client.events) > 5)
        # From here on it is one that has been on a GPU all the time.
        break_it(monkeypatch, "DeviceLost", "CUDA_ERROR_LAUNCH_FAILED")
        replica.options = on_gpu(model, no_leaks, fall_back=True)
        replica.fail(DeviceLost("in the middle of it"))
        assert not client.done
        finish(replica, client)
        assert client.tokens == expected(model, tuple(prompt), 300)
        assert replica.options.device == "cpu"
        assert replica.faults.counts == {"lost": 3, "fallback": 1}


@pytest.mark.heavy
@pytest.mark.parametrize("fall_back", [True, False])
def test_a_gpu_that_is_lost_in_mid_load(
    fall_back: bool,
    demo_model: Callable[..., Path],
    no_leaks: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each memory service finds an emulated GPU, which goes with the third copy to it."""
    emulate(monkeypatch, memory={"lose_at_copy": 3})
    model, prompt = demo_model("llama"), prompt_of(30)
    with Replica(on_gpu(model, no_leaks, fall_back=fall_back)) as replica:
        wait_for(replica, lambda: replica.known)
        client = ask(replica, prompt, 8)
        finish(replica, client)
        assert replica.faults.counts == {"lost": 3, **({"fallback": 1} if fall_back else {})}
        if fall_back:
            assert client.tokens == expected(model, tuple(prompt), 8)
            assert replica.facts["device"] == "cpu"
        else:
            assert isinstance(client.error, DeviceLost)
            assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(client.error.got)


@pytest.mark.heavy
def test_a_gpu_without_room_for_the_weights(
    demo_model: Callable[..., Path], no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch, memory={"memory": 2 << 20})
    model, prompt = demo_model("llama"), prompt_of(30)
    with Replica(on_gpu(model, no_leaks, fall_back=True)) as replica:
        wait_for(replica, lambda: replica.known)
        client = ask(replica, prompt, 8)
        finish(replica, client)
        assert client.tokens == expected(model, tuple(prompt), 8)
        assert "not enough memory for the weights" in replica.facts["device_why"]
        assert not replica.faults.absent  # there may be room for the next start
