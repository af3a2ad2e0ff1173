"""What compiled steps are tried with, and what is made of the measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coldframe.runtime.compiled.trial_plan import (
    GAIN,
    compile_bytes,
    keys_worth,
    more_pairs,
    trial_keys,
    trial_spec,
)
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.units import first_line

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def spec() -> ModelSpec:
    return ModelSpec.from_config(CONFIG)


def test_steps_are_tried_with_as_many_keys_as_the_model_has(spec: ModelSpec) -> None:
    assert list(trial_keys(spec)) == [96, 1024, 4096]
    assert list(trial_keys(replace(spec, context_length=1 << 17))) == [96, 1024, 16384]
    assert list(trial_keys(replace(spec, context_length=64))) == [64]


def test_memory_is_of_the_model(spec: ModelSpec) -> None:
    gib = 1 << 30
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    head = 2 * 2 * 32000 * 4096
    kv = 4 * 4096 * 2 * 2 * 4096  # of one layer, four sequences
    assert trial_spec(spec).layers == 1
    assert abs(compile_bytes(spec, 4) - (gib + layer + head + kv)) < 1 << 20
    assert compile_bytes(replace(spec, vocab_size=256000), 4) > 4 * gib
    assert trial_spec(replace(spec, layers=1)).layers == 1
    assert trial_spec(replace(spec, intermediate_size=8, hidden_size=512)).layers > 1


def test_what_is_open_is_measured_more_often() -> None:
    clear, near = [1.2] * 15, [1.0, 1.1] * 8
    assert more_pairs(clear[:14], 15, 60)
    assert not more_pairs(clear, 15, 60)
    assert not more_pairs([0.9] * 15, 15, 60)
    assert more_pairs(near, 15, 60)
    assert not more_pairs(near * 4, 15, 60)


def test_it_is_used_up_to_the_last_context_that_is_faster() -> None:
    fast, slow = [2.0, GAIN, 1.0], [GAIN - 0.001]
    faster = [1.5]
    assert keys_worth({96: [fast, faster], 1024: [faster]}) == (1024, GAIN)
    assert keys_worth({96: [faster, faster], 1024: [faster, slow], 4096: [fast]}) == (96, 1.5)
    assert keys_worth({96: [fast, slow], 1024: [faster]}) == (0, slow[0])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("one\ntwo"), "one"),
        (RuntimeError(""), "RuntimeError"),
        (OSError(), "OSError"),
        (RuntimeError("\nsecond"), "RuntimeError"),
    ],
)
def test_an_error_is_a_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
