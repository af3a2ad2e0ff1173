"""What the native engine refuses comes through the same stream: experts, quantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.integrations.vllm.hosts import host
from tests.runtime.integrations.vllm.memories import memory_of, placed
from tests.runtime.integrations.vllm.quantised import quantise

pytestmark = pytest.mark.vllm

PROMPTS = [[5, 6, 7], list(range(20, 60))]


def _same(model: Path, **engine) -> dict:
    """Makes sure that vLLM answers the same with either loader; what became of the parameters."""
    with host(model, **engine) as plain:
        expected = plain.generate(PROMPTS, max_tokens=8)
    with memory_of(model, layout="aligned") as memory:
        extra = {"memory_service": memory.path}
        with host(
            model, load_format="coldframe", model_loader_extra_config=extra, **engine
        ) as ours:
            assert ours.generate(PROMPTS, max_tokens=8) == expected
            return ours.call(placed)


def test_a_mixture_of_experts(tmp_path):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(7)
    config = MixtralConfig(
        vocab_size=1000,  # vLLM pads it
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        dtype="bfloat16",
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    found = _same(tmp_path, dtype="bfloat16", skip_tokenizer_init=True)
    assert any("experts" in name for name in found["apart"])
    assert found["apart"]["lm_head.weight"] == "padded"
    assert not any("norm" in name or "qkv" in name for name in found["apart"])


def test_eight_bits(demo_model, tmp_path):
    quantise(demo_model("llama", "bfloat16"), tmp_path)
    found = _same(tmp_path, dtype="bfloat16", skip_tokenizer_init=True)
    reasons = {why for name, why in found["apart"].items() if "_proj" in name}
    assert reasons == {"post-processed by CompressedTensorsLinearMethod"}
