"""What the native engine refuses comes through the same stream: experts, quantised weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runtime.integrations.vllm.hosts import host
from tests.runtime.integrations.vllm.memories import memory_of, placed

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
    """Linear layers in int8 with a scale for each row, as compressed-tensors stores them."""
    import torch
    from safetensors.torch import load_file, save_file

    model = demo_model("llama", "bfloat16")
    tensors = {}
    for shard in model.glob("*.safetensors"):
        tensors.update(load_file(shard))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[name.replace(".weight", ".weight_scale")] = scale
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**scheme, "strategy": "channel", "dynamic": False},
                "input_activations": {**scheme, "strategy": "token", "dynamic": True},
            }
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = _same(tmp_path, dtype="bfloat16", skip_tokenizer_init=True)
    reasons = {why for name, why in found["apart"].items() if "_proj" in name}
    assert reasons == {"post-processed by CompressedTensorsLinearMethod"}
