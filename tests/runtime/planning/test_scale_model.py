"""A scale model is a checkpoint like any other, with the model's shapes and few of its layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.errors import RequestError
from coldframe.loader.sources.location import parse_location
from coldframe.loader.sources.opening import open_origin
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.planning import scale_model
from coldframe.runtime.planning.scale_model import ScaleModel, write_scale_model

Make = Callable[..., Path]


def scaled(model: Path, into: Path, room: int = 1 << 30) -> ScaleModel:
    with closing(open_origin(parse_location(str(model)))) as origin:
        checkpoint = Checkpoint.open(origin)
        spec = ModelSpec.from_config(checkpoint.config, checkpoint.tensors)
        into.mkdir()
        return write_scale_model(str(into), origin, checkpoint.config, spec, room)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_it_has_the_models_shapes(demo_model: Make, tmp_path: Path, family: str) -> None:
    model = demo_model(family)
    found = scaled(model, tmp_path / "scale")
    checkpoint = Checkpoint.open(found.path)
    full = Checkpoint.open(model)
    spec = ModelSpec.from_config(checkpoint.config, checkpoint.tensors)
    whole = ModelSpec.from_config(full.config, full.tensors)
    assert spec == found.spec
    assert spec.layers == 3 < whole.layers
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.dtype, tensor.shape) == (full.tensors[name].dtype, full.tensors[name].shape)
    assert found.nbytes == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert found.head_share == 1
    tokenizer = Path(found.path, "tokenizer.json").read_bytes()
    assert tokenizer == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_its_weights_are_one_number_and_one_token_is_likelier(
    demo_model: Make, tmp_path: Path, dtype: str
) -> None:
    found = scaled(demo_model("llama", dtype), tmp_path / "scale")
    weights = load_file(Path(found.path, "model.safetensors"))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).float()
    assert head.argmax(0).unique().tolist() == [found.spec.vocab_size // 2]
    assert head.unique().tolist() == [2.0**-10, 2.0**-8]


@pytest.mark.heavy
def test_transformers_takes_it(demo_model: Make, tmp_path: Path) -> None:
    found = scaled(demo_model("llama", "bfloat16"), tmp_path / "scale")
    loaded = AutoModelForCausalLM.from_pretrained(found.path, dtype="auto")
    with torch.inference_mode():
        logits = loaded(torch.tensor([[5, 6, 7]])).logits[0, -1]
    assert int(logits.argmax()) == found.spec.vocab_size // 2


def test_a_large_vocabulary_is_cut(
    demo_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = demo_model("llama")
    monkeypatch.setattr(scale_model, "_MOST_EMBEDDING", 1)
    monkeypatch.setattr(scale_model, "_LEAST_VOCABULARY", 100)
    found = scaled(model, tmp_path / "scale")
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    assert found.spec.vocab_size == 100
    assert found.head_share == 100 / vocabulary
    Checkpoint.open(found.path)


def test_little_room_is_for_few_layers_and_then_for_none(demo_model: Make, tmp_path: Path) -> None:
    whole = scaled(demo_model("llama"), tmp_path / "whole")
    fewer = scaled(demo_model("llama"), tmp_path / "fewer", whole.nbytes - 1)
    assert fewer.spec.layers == 2
    with pytest.raises(RequestError, match="one layer of the model is more"):
        scaled(demo_model("llama"), tmp_path / "none", 1000)
