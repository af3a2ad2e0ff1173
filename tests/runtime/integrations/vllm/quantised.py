"""A checkpoint in a form that the native engine does not run."""

from __future__ import annotations

import json
from pathlib import Path


def quantise(model: Path, target: Path) -> None:
    """Writes config and weights of a model with linear layers in int8.

    A scale for each row, as compressed-tensors stores them; activations are quantised as they come.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for shard in model.glob("*.safetensors"):
        tensors.update(load_file(shard))
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[name.replace(".weight", ".weight_scale")] = scale
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
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
    (target / "config.json").write_text(json.dumps(config))
