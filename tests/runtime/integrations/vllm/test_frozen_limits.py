"""Engines that cannot be frozen are refused by their arguments, before anything is begun."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coldframe.loader.errors import PlatformError, SnapshotError
from coldframe.runtime.integrations.vllm.frozen_image import EngineImage
from coldframe.runtime.integrations.vllm.frozen_limits import (
    ARGUMENTS,
    check,
    check_built,
    engine_arguments,
)
from coldframe.runtime.options import SnapshotOptions


def test_what_is_not_said_is_such_that_it_can_be() -> None:
    given = {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 20}
    assert engine_arguments(given) == {**ARGUMENTS, **given}
    assert engine_arguments({}) == ARGUMENTS


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tensor_parallel_size": 2}, "processes of their own"),
        ({"pipeline_parallel_size": 2}, "processes of their own"),
        ({"data_parallel_size": 2}, "processes of their own"),
        ({"distributed_executor_backend": "mp"}, "processes of their own"),
        ({"enforce_eager": False}, "compiled code"),
        ({"quantization": "fp8"}, "have|has not been tried"),
        ({"speculative_config": {"method": "ngram"}}, "drafter"),
        ({"enable_lora": True}, "adapters"),
        ({"kv_transfer_config": {"kv_connector": "X"}}, "connector"),
        ({"kv_cache_memory_bytes": None}, "measure"),
        ({"load_format": "dummy"}, "each clone is told it"),
        ({"model": "elsewhere"}, "each clone is told it"),
    ],
)
def test_what_cannot_be_frozen_is_said_with_the_reason(given: dict[str, Any], why: str) -> None:
    with pytest.raises(SnapshotError, match=why) as raised:
        engine_arguments(given)
    assert raised.value.where == next(iter(given))


def test_eager_has_to_be_asked_for() -> None:
    with pytest.raises(SnapshotError, match="compiled code"):
        check({"kv_cache_memory_bytes": 1 << 20})


def test_nothing_is_begun_for_one_that_cannot_be(tmp_path: Path) -> None:
    snapshot = SnapshotOptions(mode="require", store=str(tmp_path / "store"))
    engine = EngineImage(str(tmp_path), {"tensor_parallel_size": 2}, 1)
    with pytest.raises(SnapshotError, match="ranks"):
        engine.create(snapshot)
    assert list(tmp_path.iterdir()) == []


def test_an_interpreter_without_vllm_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(PlatformError, match="interpreter that has it"):
        _ = EngineImage(str(tmp_path), {}, 1).key


class InprocClient:
    """What vLLM calls a core in the same process."""


class SyncMPClient:
    """And one in another."""


def built(core: object, device: str = "cpu", quantization: str | None = None) -> Any:
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(quantization=quantization),
    )
    return SimpleNamespace(engine_core=core, vllm_config=config)


def test_what_vllm_has_decided_by_itself_is_looked_at() -> None:
    check_built(built(InprocClient()))
    for engine, where in (
        (built(SyncMPClient()), "VLLM_ENABLE_V1_MULTIPROCESSING"),
        (built(InprocClient(), device="cuda"), "device"),
        (built(InprocClient(), quantization="awq"), "quantization"),
    ):
        with pytest.raises(SnapshotError) as raised:
            check_built(engine)
        assert raised.value.where == where
