from __future__ import annotations

import pytest

from coldframe.loader.errors import DeviceError, RequestError
from coldframe.runtime.flags import Parser
from coldframe.runtime.options import ReplicaOptions, ScalingOptions
from coldframe.runtime.scale_spec import Scale
from coldframe.runtime.worker_flags import add_worker_arguments, worker_options


def options(*arguments: str) -> ReplicaOptions:
    parser = Parser()
    add_worker_arguments(parser)
    return ReplicaOptions("m", **worker_options(parser.parse(arguments)))


def test_by_default_there_is_one_of_each() -> None:
    assert options().scales == ReplicaOptions("m").scales
    assert options().scales == {"prefill": Scale(1, 1), "decode": Scale(1, 1)}
    assert (options().scaling, options().pin, options().threads) == (ScalingOptions(), False, None)
    assert options().local_prefill == ReplicaOptions("m").local_prefill == 64


def test_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_DECODE", "2@cpu")
    monkeypatch.setenv("COLDFRAME_PIN", "1")
    found = options(
        *("--prefill", "1-4", "--prefill-share", "9", "--decode-share", "8", "--scale-down", "2.5"),
        *("--threads", "3", "--local-prefill", "0"),
    )
    assert found.scales == {"prefill": Scale(1, 4), "decode": Scale(2, 2)}
    assert found.scaling == ScalingOptions(9, 8, 2.5)
    assert (found.pin, found.threads, found.local_prefill) == (True, 3, 0)


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
    ],
)
def test_what_cannot_be_is_refused_by_its_name(arguments: tuple[str, str], where: str) -> None:
    with pytest.raises(RequestError) as raised:
        options(*arguments)
    assert raised.value.where == where


def test_a_gpu_is_refused() -> None:
    with pytest.raises(DeviceError, match="CUDA"):
        options("--prefill", "1@cuda:0")
