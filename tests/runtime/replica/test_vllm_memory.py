"""What a vLLM engine takes, and whether there is so much: as numbers, of a real model's tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from coldframe.loader.errors import DeviceFull
from coldframe.runtime.engine.foreign import foreign_spec
from coldframe.runtime.replica.sizing import CONTEXT_BYTES, ModelFacts, StoredTensor
from coldframe.runtime.replica.vllm_memory import (
    ENGINE_BYTES,
    copied_bytes,
    default_kv,
    kv_that_fits,
)

GIB = 1 << 30
Make = Callable[..., Path]


def stored(model: Path) -> dict[str, Any]:
    return {
        name: tensor
        for path in model.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_on_a_cpu_all_that_is_multiplied_with_is_packed(demo_model: Make, family: str) -> None:
    facts = ModelFacts(str(demo_model(family)))
    packed = {
        name: tensor.nbytes
        for name, tensor in stored(demo_model(family)).items()
        if tensor.dim() == 2 and (facts.spec.tied or "embed" not in name)
    }
    assert packed
    assert copied_bytes(facts.spec, facts.tensors, "cpu") == sum(packed.values())
    assert copied_bytes(facts.spec, facts.tensors, "cuda:0") == 0


def test_on_a_gpu_experts_and_quantised_weights_are_copied(demo_model: Make) -> None:
    spec = foreign_spec(ModelFacts(str(demo_model())).config)
    tensors = {
        "model.embed_tokens.weight": StoredTensor("BF16", [1000, 64]),
        "model.layers.0.self_attn.q_proj.weight": StoredTensor("BF16", [64, 64]),
        "model.layers.0.mlp.experts.3.up_proj.weight": StoredTensor("BF16", [32, 64]),
        "model.layers.0.mlp.up_proj.weight": StoredTensor("F8_E4M3", [16, 64]),
    }
    assert copied_bytes(spec, tensors, "cuda:0") == 32 * 64 * 2 + 16 * 64


@pytest.fixture
def facts(demo_model: Make) -> ModelFacts:
    return ModelFacts(str(demo_model()))


def fits(facts: ModelFacts, **more: Any) -> int:
    given = {"device": "cpu", "wanted": None, "native_kv": GIB, "coming": 0, "available": 9 * GIB}
    return kv_that_fits(facts.spec, facts.tensors, **{**given, **more})


def test_there_is_as_much_kv_as_the_replica_has_or_a_quarter_of_what_is_left(
    facts: ModelFacts,
) -> None:
    taken = ENGINE_BYTES + copied_bytes(facts.spec, facts.tensors, "cpu")
    assert fits(facts) == GIB
    assert fits(facts, available=GIB) == (GIB - taken) // 4
    assert fits(facts, available=GIB, coming=taken) == (GIB - 2 * taken) // 4
    assert fits(facts, wanted=5 * GIB) == 5 * GIB
    assert fits(facts, device="cuda:0") == GIB
    assert default_kv(facts.spec, GIB, -1) == 0
    foreign = foreign_spec(facts.config)
    assert default_kv(foreign, 1, 80 * GIB) == 4 * GIB


def test_what_does_not_fit_is_refused_before_anything_is_taken(facts: ModelFacts) -> None:
    taken = ENGINE_BYTES + copied_bytes(facts.spec, facts.tensors, "cpu")
    assert fits(facts, wanted=GIB, available=GIB + taken) == GIB
    for device, available in (("cpu", GIB + taken - 1), ("cuda:0", GIB + CONTEXT_BYTES - 1)):
        with pytest.raises(DeviceFull, match="for KV") as raised:
            fits(facts, wanted=GIB, available=available, device=device)
        assert raised.value.where == device
        assert "--vllm-kv" in raised.value.hint
        assert raised.value.got is not None
    with pytest.raises(DeviceFull, match="still to come"):
        fits(facts, available=GIB, coming=GIB)
    # What is left has no room for a sequence.
    for left in (0, 4 << 10):
        with pytest.raises(DeviceFull, match="for KV"):
            fits(facts, available=taken + left)
    # Who has its engine already needs no more for that.
    assert fits(facts, wanted=GIB, available=GIB + taken - ENGINE_BYTES, itself=0) == GIB
