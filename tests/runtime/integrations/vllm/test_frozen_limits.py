"""Engines that cannot be frozen are refused by their arguments, before anything is begun."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.runtime.integrations.vllm.engine import engine_arguments
from coldframe.runtime.integrations.vllm.frozen_image import EngineImage
from coldframe.runtime.integrations.vllm.frozen_limits import check, check_built
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.replica.vllm_spec import VllmOptions


def of_a_replica(**given: Any) -> dict[str, Any]:
    return engine_arguments("/model", "cpu", "F32", 1024, 1 << 20, given)


def test_what_a_replica_sets_can_be_frozen() -> None:
    check(of_a_replica())
    check(of_a_replica(max_num_seqs=8, enable_prefix_caching=False))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"decode_context_parallel_size": 2}, "processes of their own"),
        ({"enforce_eager": False}, "compiled code"),
        ({"quantization": "fp8"}, "have|has not been tried"),
        ({"enable_lora": True}, "adapters"),
    ],
)
def test_what_cannot_be_frozen_is_said_with_the_reason(given: dict[str, Any], why: str) -> None:
    with pytest.raises(SnapshotError, match=why) as raised:
        check(of_a_replica(**given))
    assert raised.value.where == next(iter(given))


@pytest.mark.parametrize("name", ["tensor_parallel_size", "speculative_config"])
def test_what_a_replica_would_refuse_is_refused_here_too(name: str) -> None:
    with pytest.raises(SnapshotError) as raised:
        check({**of_a_replica(), name: 2})
    assert raised.value.where == name


def test_nothing_is_begun_for_one_that_cannot_be(demo_model: Any, tmp_path: Path) -> None:
    store = tmp_path / "store"
    snapshot = SnapshotOptions(mode="require", store=str(store))
    engine = EngineImage(str(demo_model()), VllmOptions(args=(("enforce_eager", False),)), 1)
    with pytest.raises(SnapshotError, match="compiled code"):
        engine.create(snapshot)
    assert not store.exists()


class InprocClient:
    """What vLLM calls a core in the same process."""


class SyncMPClient:
    """And one in another."""


def built(
    core: object, device: str = "cpu", quantization: str | None = None, *, experts: bool = False
) -> Any:
    config = SimpleNamespace(
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(quantization=quantization, is_moe=experts),
    )
    return SimpleNamespace(engine_core=core, vllm_config=config)


def test_what_vllm_has_decided_by_itself_is_looked_at() -> None:
    check_built(built(InprocClient()))
    for engine, where in (
        (built(SyncMPClient()), "VLLM_ENABLE_V1_MULTIPROCESSING"),
        (built(InprocClient(), device="cuda"), "device"),
        (built(InprocClient(), quantization="awq"), "quantization"),
        (built(InprocClient(), experts=True), "model"),
    ):
        with pytest.raises(SnapshotError) as raised:
            check_built(engine)
        assert raised.value.where == where
