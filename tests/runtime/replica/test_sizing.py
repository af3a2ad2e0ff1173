from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import DeviceError
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.scale_spec import Scale
from coldframe.runtime.replica.sizing import KvSize, ModelFacts, kv_blocks


@pytest.fixture
def spec(demo_model: Callable[..., Path]) -> ModelSpec:
    return ModelFacts(str(demo_model("llama"))).spec


def test_on_a_cpu_it_is_decided_here(spec: ModelSpec) -> None:
    size = KvSize.of(spec, ReplicaOptions("m", kv_bytes=1 << 20))
    assert size == (*kv_blocks(spec, 1 << 20), None)
    assert KvSize.of(spec, ReplicaOptions("m")).blocks
    with pytest.raises(DeviceError, match="larger than what is available"):
        KvSize.of(spec, ReplicaOptions("m", kv_bytes=1 << 50))


def test_on_a_gpu_the_memory_service_decides_unless_somebody_has_said(spec: ModelSpec) -> None:
    alone = ReplicaOptions("m", device="cuda:0", prefill=Scale(1, 2), decode=2)
    size = KvSize.of(spec, alone)
    assert size.blocks is None
    assert size.room is not None
    assert (size.room.part, size.room.reserve) == (1.0, 4 * 512 << 20)
    shared = KvSize.of(spec, ReplicaOptions("m", device="cuda:0", kv_part=0.25))
    assert shared.room is not None
    assert shared.room.part == 0.25
    # It may be more than the host has; whether the GPU has it shows there.
    said = KvSize.of(spec, ReplicaOptions("m", device="cuda:0", kv_bytes=1 << 50))
    assert (said.blocks, said.room) == ((1 << 50) // said.block_bytes, None)
    with pytest.raises(DeviceError, match="not one block"):
        KvSize.of(spec, ReplicaOptions("m", device="cuda:0", kv_bytes=7))
