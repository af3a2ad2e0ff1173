"""Frequencies and rotation against Transformers', over the settings that each kind knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from coldframe.loader.errors import CheckpointError, UnsupportedModel
from coldframe.runtime.engine.fields import Fields
from coldframe.runtime.engine.rope import Rope, rotate
from coldframe.runtime.engine.ropespec import RopeSpec

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "old keys": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 5e4}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    "llama3, context left out": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": {**YARN, "original_max_position_embeddings": 64}},
    "yarn, context beside": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "yarn, ramp": {
        "rope_scaling": {
            **YARN,
            "original_max_position_embeddings": 64,
            "beta_fast": 16,
            "beta_slow": 2,
            "truncate": False,
        }
    },
    "yarn, factor of attention": {"rope_scaling": {**YARN, "attention_factor": 0.7}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5}},
    "yarn, mscale alone": {"rope_scaling": {**YARN, "mscale": 0.8}},
    "yarn, factor from the contexts": {
        "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 64}
    },
}


def spec_of(settings: dict[str, Any], head_dim: int = 24) -> RopeSpec:
    return RopeSpec.from_config(Fields(settings, "config.json"), head_dim, 256)


def reference_of(settings: dict[str, Any], head_dim: int = 24) -> LlamaRotaryEmbedding:
    kwargs = {k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=256,
        **kwargs,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [24, 128])
@pytest.mark.parametrize("settings", SETTINGS)
def test_rotation_is_transformers(settings, head_dim) -> None:
    rope = Rope(spec_of(SETTINGS[settings], head_dim), head_dim)
    # 300 is beyond the 256 positions that the models are made for.
    for length in (1, 64, 300):
        positions = torch.arange(length)
        q, k = torch.randn(2, length, 3, head_dim)
        cos, sin = reference_of(SETTINGS[settings], head_dim)(q, positions[None])
        expected = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
        ours = rope.cos_sin(positions, torch.full((length,), length), torch.float32)
        for x, reference in zip((q, k), expected, strict=True):
            torch.testing.assert_close(rotate(x, *ours), reference[0], rtol=0, atol=2e-5)


def test_dynamic_keys_do_not_depend_on_the_chunks() -> None:
    rope = Rope(spec_of(SETTINGS["dynamic"]), 24)
    positions = torch.arange(320)
    whole = rope.cos_sin(positions, torch.full((320,), 300), torch.float32)
    for cut in (1, 128, 300, 311):
        parts = [
            rope.cos_sin(part, torch.full((len(part),), 300), torch.float32)
            for part in (positions[:cut], positions[cut:])
        ]
        for ours, expected in zip(zip(*parts, strict=True), whole, strict=True):
            torch.testing.assert_close(torch.cat(ours), expected, rtol=0, atol=2e-5)
    short = rope.cos_sin(positions[:256], torch.full((256,), 256), torch.float32)[0]
    assert not torch.allclose(short, whole[0][:256])


def test_context_that_the_scaling_makes_room_for() -> None:
    expected = {
        "nothing said": 256,
        "linear": 768,
        "dynamic": 512,
        "llama3": 256,
        "yarn": 256,
        "yarn, factor of attention": 1024,
    }
    assert {name: spec_of(SETTINGS[name]).context_length for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling: rope_type"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]}}, "rope_type"),
        ({"rope_parameters": {"mrope_section": [4, 4, 4]}}, "rope_parameters"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.25}, "config.json: partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    ],
)
def test_refuses_what_it_does_not_compute(settings, where) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        spec_of(settings)
    assert where in caught.value.where


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"rope_theta": 0}, "config.json: rope_theta"),
        ({"rope_theta": "1e4"}, "config.json: rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": 3}}, "rope_scaling: type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling: factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": float("nan")}}, "rope_scaling: factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "rope_scaling: truncate"),
        # What overflows, or has no logarithm, is an error here and not one of arithmetic later.
        ({"rope_theta": 1e308}, "config.json: rope_theta"),
        ({"rope_theta": 1, "rope_scaling": YARN}, "config.json: rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "rope_scaling: factor"),
        ({"rope_scaling": {**YARN, "factor": 1e308}}, "rope_scaling: factor"),
        ({"rope_scaling": {**YARN, "beta_fast": 1e308}}, "rope_scaling: beta_fast"),
        ({"rope_scaling": {**YARN, "beta_slow": 1e-308}}, "rope_scaling: beta_slow"),
    ],
)
def test_refuses_bad_values(settings, where) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_of(settings)
    assert not isinstance(caught.value, UnsupportedModel)
    assert where in caught.value.where
    assert caught.value.expected or caught.value.got


def test_dynamic_needs_more_than_one_pair() -> None:
    with pytest.raises(CheckpointError, match="head_dim"):
        spec_of(SETTINGS["dynamic"], head_dim=2)
