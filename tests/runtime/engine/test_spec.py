"""The spec against Transformers' own configs and models, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coldframe.loader.errors import CheckpointError, UnsupportedModel
from coldframe.runtime.engine.spec import ModelSpec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class Header:
    """A tensor as a safetensors header names it."""

    def __init__(self, *shape: int, dtype: str = "F32") -> None:
        self.shape = shape
        self.dtype = dtype


def headers(spec: ModelSpec, **changes: Header | None) -> dict[str, Header]:
    """The tensors that the spec expects, some replaced or (None) left out."""
    found = {
        name: Header(*shape, dtype=spec.dtype) for name, shape in spec.expected_tensors().items()
    }
    for name, header in changes.items():
        if header is None:
            del found[name]
        else:
            found[name] = header
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"num_key_value_heads": None},
        {"head_dim": None, "hidden_size": 512},
        {"head_dim": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_expected_tensors_are_those_of_transformers(config, tmp_path, family, changes) -> None:
    given = config(family, **changes)
    if (family, changes) in (
        ("mistral", {"attention_bias": True}),
        ("mistral", {"mlp_bias": True}),
        ("qwen2", {"mlp_bias": True}),
        ("qwen3", {"mlp_bias": True}),
    ):
        with pytest.raises(UnsupportedModel):
            ModelSpec.from_config(given)
        return
    if family.startswith("qwen") and changes.get("head_dim", 1) is None:
        del given["head_dim"]  # Transformers takes no null here
    if family == "mistral" and "num_key_value_heads" in changes:
        # Transformers takes no null here, and eight where there is no such key.
        given["num_key_value_heads"] = given["num_attention_heads"]
    spec = ModelSpec.from_config(given)
    kwargs = {key: value for key, value in given.items() if key != "model_type"}
    reference = AutoConfig.for_model(family, **kwargs)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(reference)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert spec.expected_tensors() == expected
    # What Transformers 5 saves of it reads as the same model.
    reference.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert ModelSpec.from_config(saved) == spec


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["full_attention", "sliding_attention"],
            },
        ),
    ],
)
def test_windows_are_those_of_transformers(config, family, changes) -> None:
    given = config(family, **changes)
    reference = AutoConfig.for_model(**given)
    expected = tuple(
        reference.sliding_window if kind == "sliding_attention" else None
        for kind in reference.layer_types
    )
    assert ModelSpec.from_config(given).windows == expected


def test_mistral_has_one_window_for_all_layers(config) -> None:
    given = config("mistral")
    assert ModelSpec.from_config(given).windows == (None, None)
    assert ModelSpec.from_config(given | {"sliding_window": 7}).windows == (7, 7)
    del given["sliding_window"]
    assert ModelSpec.from_config(given).windows == (4096, 4096)
    with pytest.raises(UnsupportedModel, match="layer_types"):
        ModelSpec.from_config(given | {"layer_types": ["full_attention", "sliding_attention"]})


def test_fields_that_the_engine_reads(config) -> None:
    given = config("qwen3", eos_token_id=[2, 5], bos_token_id=None, torch_dtype="bfloat16")
    spec = ModelSpec.from_config(given)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.layers) == (4, 2, 24, 2)
    assert (spec.eos_token_ids, spec.bos_token_id) == ((2, 5), None)
    assert (spec.dtype, spec.dtype_bytes, spec.rms_norm_eps) == ("BF16", 2, 1e-5)
    assert spec.kv_token_bytes(2) == 2 * 2 * 2 * 24 * 2
    assert spec.kv_block_bytes(2) == 32 * spec.kv_token_bytes(2)
    assert ModelSpec.from_config(config("llama", eos_token_id=None)).eos_token_ids == ()


def test_the_tensors_decide_the_dtype(config) -> None:
    given = config("llama", torch_dtype="float32")
    spec = ModelSpec.from_config(given)
    stored = {n: Header(*s, dtype="BF16") for n, s in spec.expected_tensors().items()}
    stored["model.norm.weight"] = Header(64, dtype="F32")
    for name in ("inv_freq", "cos_cached"):
        stored[f"model.layers.0.self_attn.rotary_emb.{name}"] = Header(8)
    assert ModelSpec.from_config(given, stored).dtype == "BF16"


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (2,)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 2, 9]}, (7, 2, 9)),
    ],
    ids=str,
)
def test_the_end_of_text_is_that_of_transformers(config, tmp_path, generation, expected) -> None:
    given = config("llama")
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(given))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ends = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert ModelSpec.from_config(given, generation=generation).eos_token_ids == expected
    assert tuple(ends) == expected


def test_a_generation_config_that_names_no_end_leaves_the_config_s(config) -> None:
    # Transformers would go on to the length limit then. Nobody who wrote such a file meant that.
    for generation in ({}, {"temperature": 0.6}, {"eos_token_id": None}, {"eos_token_id": []}):
        spec = ModelSpec.from_config(config("llama"), generation=generation)
        assert spec.eos_token_ids == (2,)


@pytest.mark.parametrize("ends", [256, -1, "2", [2, 256], [True]], ids=str)
def test_refuses_an_end_of_text_that_is_no_token(config, ends) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        ModelSpec.from_config(config("llama"), generation={"eos_token_id": ends})


def test_refuses_other_layers_than_the_config_says(config) -> None:
    stored = headers(ModelSpec.from_config(config("llama", num_hidden_layers=3)))
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_config(config("llama"), stored)
    assert "num_hidden_layers" in str(caught.value.where)
    assert (caught.value.expected, caught.value.got) == ("3", "2")
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\."):
        ModelSpec.from_config(config("llama", num_hidden_layers=4), stored)


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "self_attn.q_norm.weight"])
def test_refuses_a_layer_of_which_it_would_leave_something_out(config, name) -> None:
    name = f"model.layers.1.{name}"
    stored = headers(ModelSpec.from_config(config("llama")), **{name: Header(64)})
    with pytest.raises(UnsupportedModel) as caught:
        ModelSpec.from_config(config("llama"), stored)
    assert caught.value.where == name


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "header", "expected", "got"),
    [
        (Q, None, "[64, 64]", "nothing"),
        ("lm_head.weight", None, "[256, 64]", "nothing"),
        (Q, Header(64, 32), "[64, 64]", "[64, 32]"),
        ("model.norm.weight", Header(1, 64), "[64]", "[1, 64]"),
        (Q, Header(64, 64, dtype="F8_E4M3"), "F32", "F8_E4M3"),
        (Q, Header(64, 64, dtype="BF16"), "F32", "BF16"),
        ("model.norm.weight", Header(64, dtype="I64"), "BF16 or F16 or F32", "I64"),
        ("model.embed_tokens.weight", Header(256, 64, dtype="I8"), "BF16 or F16 or F32", "I8"),
    ],
)
def test_refuses_tensors_that_do_not_fit(config, name, header, expected, got) -> None:
    given = config("llama")
    stored = headers(ModelSpec.from_config(given), **{name: header})
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_config(given, stored)
    error = caught.value
    assert (error.where, error.got) == (name, got)
    assert expected in error.expected


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "architectures"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"architectures": None, "model_type": "gemma2"}, "model_type"),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "config.json"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "config.json"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 0.0625}, "logit_scale"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype"),
    ],
    ids=str,
)
def test_refuses_models_that_it_does_not_run(config, changes, where) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelSpec.from_config(config("llama", **changes))
    assert where in caught.value.where


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"num_hidden_layers": -2}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None}, "hidden_size"),
        ({"head_dim": 15}, "head_dim"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"eos_token_id": 256}, "eos_token_id"),
        ({"eos_token_id": [2, "</s>"]}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": ["MistralForCausalLM"]}, "config.json"),
        ({"architectures": None, "model_type": None}, "config.json"),
        ({"rope_theta": -1}, "rope_theta"),
    ],
    ids=str,
)
def test_refuses_absurd_values(config, changes, where) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_config(config("llama", **changes))
    assert not isinstance(caught.value, UnsupportedModel)
    assert where in caught.value.where
    assert caught.value.expected or caught.value.got


def test_layer_types_are_checked(config) -> None:
    sliding: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8}
    with pytest.raises(CheckpointError, match="layer_types"):
        ModelSpec.from_config(config("qwen2", **sliding, layer_types=["full_attention"]))
    with pytest.raises(CheckpointError, match="sliding_window"):
        ModelSpec.from_config(config("qwen2", layer_types=["sliding_attention"] * 2))


def test_a_config_that_is_no_object() -> None:
    with pytest.raises(CheckpointError, match="not a JSON object"):
        ModelSpec.from_config([])  # type: ignore[arg-type]


def test_reading_a_config_imports_nothing_heavy() -> None:
    code = (
        "import sys, coldframe.runtime.engine.spec\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
