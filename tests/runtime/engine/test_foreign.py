"""What is read of a config whose model another engine is to serve."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.loader.errors import CheckpointError
from coldframe.runtime.engine.foreign import foreign_spec


@pytest.mark.parametrize(
    ("config", "vocabulary", "context"),
    [
        ({"vocab_size": 100, "max_position_embeddings": 64}, 100, 64),
        ({"vocab_size": 100, "n_positions": 64, "n_ctx": 32}, 100, 64),  # GPT-2
        ({"vocab_size": 100, "n_positions": None, "n_ctx": 32}, 100, 32),
        ({"n_vocab": 100, "max_seq_len": 64}, 100, 64),
        ({"padded_vocab_size": 100, "seq_length": 64}, 100, 64),  # ChatGLM
        ({"vocab_size": 1, "text_config": {"vocab_size": 9, "n_ctx": 8}}, 9, 8),
    ],
)
def test_each_name_for_the_sizes(config: dict[str, Any], vocabulary: int, context: int) -> None:
    spec = foreign_spec({"torch_dtype": "float32", **config})
    assert (spec.vocab_size, spec.context_length) == (vocabulary, context)


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        ({"vocab_size": 100}, "max_position_embeddings"),  # a state-space model's
        ({"n_ctx": 64}, "vocab_size"),
        ({"vocab_size": 100, "n_positions": -1}, "n_positions"),
    ],
)
def test_a_config_without_them(config: dict[str, Any], lacking: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        foreign_spec({"torch_dtype": "float32", **config})
    assert lacking in str(caught.value)
