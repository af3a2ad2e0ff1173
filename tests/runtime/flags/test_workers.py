from __future__ import annotations

from dataclasses import replace

import pytest

from coldframe.loader.errors import DeviceError, RequestError
from coldframe.runtime.flags.parser import Parser
from coldframe.runtime.flags.workers import add_worker_arguments, worker_options
from coldframe.runtime.options import ReplicaOptions, ScalingOptions
from coldframe.runtime.replica.scale_spec import Scale


@pytest.fixture(autouse=True)
def _nobody_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLDFRAME_DEVICE")


def options(*arguments: str) -> ReplicaOptions:
    parser = Parser()
    add_worker_arguments(parser)
    return ReplicaOptions("m", **worker_options(parser.parse(arguments)))


def test_by_default_there_is_one_of_each() -> None:
    assert options().scales == ReplicaOptions("m").scales
    assert options().scales == {"prefill": Scale(1, 1), "decode": Scale(1, 1)}
    assert (options().scaling, options().pin, options().threads) == (ScalingOptions(), False, None)
    assert options().local_prefill == ReplicaOptions("m").local_prefill == 64
    assert options().graphs


def test_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_DECODE", "2@cpu")
    monkeypatch.setenv("COLDFRAME_PIN", "1")
    found = options(
        *("--prefill", "1-4", "--prefill-share", "9", "--decode-share", "8", "--scale-down", "2.5"),
        *("--threads", "3", "--local-prefill", "0", "--graphs", "off"),
    )
    assert (options().checkpoint, options("--checkpoint", "off").checkpoint) == ("auto", "off")
    monkeypatch.setenv("COLDFRAME_CHECKPOINT", "off")
    assert options().contexts_stay == "a CPU has none"
    assert replace(options(), device="cuda:0", decode=1).contexts_stay == "--checkpoint off"
    assert replace(ReplicaOptions("m"), device="cuda:0").contexts_stay is None
    assert found.scales == {"prefill": Scale(1, 4), "decode": Scale(2, 2, "cpu")}
    assert (found.device, found.device_of("prefill")) == ("cpu", "cpu")
    assert found.scaling == ScalingOptions(9, 8, 2.5)
    assert (found.pin, found.threads, found.local_prefill) == (True, 3, 0)
    assert not found.graphs
    monkeypatch.setenv("COLDFRAME_GRAPHS", "off")
    assert not options().graphs
    assert options("--graphs", "auto").graphs


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("--prefill", "0"), "--prefill"),
        (("--decode", "3-1"), "--decode"),
        (("--prefill-share", "0"), "--prefill-share"),
        (("--decode-share", "-5"), "--decode-share"),
        (("--scale-down", "0"), "--scale-down"),
        (("--scale-down", "inf"), "--scale-down"),
        (("--scale-down", "nan"), "--scale-down"),
        (("--threads", "0"), "--threads"),
        (("--local-prefill", "-1"), "--local-prefill"),
        (("--device", "gpu"), "--device"),
        (("--device", "cuda:x"), "--device"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(arguments: tuple[str, str], where: str) -> None:
    with pytest.raises(RequestError) as raised:
        options(*arguments)
    assert raised.value.where == where


@pytest.mark.parametrize(
    ("arguments", "device"),
    [
        (("--device", "cuda"), "cuda:0"),
        (("--device", "cuda:1", "--prefill", "1-4@cuda:1"), "cuda:1"),
        (("--prefill", "1-4@cuda:0", "--decode", "2@cuda"), "cuda:0"),
        (("--decode", "2@cuda:1"), "cuda:1"),
    ],
)
def test_one_device_for_all(arguments: tuple[str, ...], device: str) -> None:
    found = options(*arguments)
    assert {found.device, *map(found.device_of, ("prefill", "decode"))} == {device}
    assert not found.fall_back  # somebody has asked for it by its name


@pytest.mark.parametrize(
    ("arguments", "devices"),
    [
        (("--prefill", "1-2@cuda:0", "--decode", "1@cuda:1"), ("cuda:0", "cuda:1")),
        (("--device", "cuda:0", "--decode", "1@cuda:2"), ("cuda:0", "cuda:2")),
        (("--device", "cuda:0", "--prefill", "1@cuda:1"), ("cuda:1", "cuda:0")),
    ],
)
def test_a_gpu_for_each_role(arguments: tuple[str, ...], devices: tuple[str, str]) -> None:
    found = options(*arguments)
    # The weights go to that of prefill first.
    assert found.devices == devices
    assert (found.device_of("prefill"), found.device_of("decode")) == devices
    assert not found.fall_back
    assert found.on_cpu("it cannot be used").devices == ("cpu",)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prefill", "1@cpu", "--decode", "1@cuda:0"),
        ("--prefill", "1@cuda:0", "--decode", "1@cpu"),
        ("--device", "cuda:0", "--prefill", "1@cpu"),
        ("--device", "cpu", "--decode", "1@cuda"),
    ],
)
def test_a_cpu_and_a_gpu_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(DeviceError, match="on GPUs or on the CPU") as raised:
        options(*arguments)
    assert str(raised.value.got).count("cuda") in (1, 2)
    assert str(raised.value.where) == "--device, --prefill, --decode"


def test_the_environment_names_a_device_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_DEVICE", "cuda:3")
    assert options().device == "cuda:3"
    assert options("--device", "cpu").device == "cpu"
