"""What is known of a model that the native engine does not run, from its config alone.

The front needs little of a model: its vocabulary, its context, and the tokens that end an answer.
The rest of a spec is filled in as far as the config has it, and nobody computes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldframe.loader.errors import CheckpointError
from coldframe.runtime.engine.families import stored_dtype
from coldframe.runtime.engine.fields import Fields
from coldframe.runtime.engine.ropespec import RopeSpec
from coldframe.runtime.engine.spec import FOREIGN, ModelSpec, TensorLike

__all__ = ["foreign_spec", "read_spec"]

_VOCABULARY = ("vocab_size", "n_vocab", "padded_vocab_size")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""The names by which configs say it, the first of them that a config has."""


def read_spec(
    init: Mapping[str, Any], tensors: Mapping[str, TensorLike] | None = None
) -> ModelSpec:
    """The spec of the model that a worker is told to serve.

    Args:
        init: What it is told: `config`, `generation`, and whether it is a `native` model.
        tensors: The checkpoint's tensors by name, where they are known, to be checked.

    Raises:
        CheckpointError: It is no sound model, or none that the engine runs.
    """
    if init["native"]:
        return ModelSpec.from_config(init["config"], tensors, init["generation"])
    return foreign_spec(init["config"], init["generation"])


def foreign_spec(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The spec of a model that another engine is to serve.

    Args:
        config: The parsed config.json. What a model of several modalities says of text is its
            `text_config`.
        generation: The parsed generation_config.json.

    Raises:
        UnsupportedModel: It computes in no dtype that there is.
        CheckpointError: It does not say how large its vocabulary or its context is.
    """
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else {}
    fields = Fields({**config, **text}, "config.json")
    vocab = _first(fields, _VOCABULARY)
    context = _first(fields, _CONTEXT)
    layers = fields.positive("num_hidden_layers", default=1)
    hidden = fields.positive("hidden_size", default=1)
    heads = fields.positive("num_attention_heads", default=1)
    ends = Fields(generation or {}, "generation_config.json").token_ids("eos_token_id", vocab)
    return ModelSpec(
        family=FOREIGN,
        dtype=stored_dtype(fields),
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.positive("intermediate_size", default=1),
        layers=layers,
        heads=heads,
        kv_heads=_or(fields, "num_key_value_heads", heads),
        head_dim=_or(fields, "head_dim", max(1, hidden // heads)),
        rms_norm_eps=1e-6,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=(None,) * layers,
        tied=fields.flag("tie_word_embeddings"),
        rope=RopeSpec("default", 10000.0, context, context_length=context),
        max_position_embeddings=context,
        context_length=context,
        bos_token_id=None,
        eos_token_ids=ends or fields.token_ids("eos_token_id", vocab),
    )


def _first(fields: Fields, names: tuple[str, ...]) -> int:
    """The number by one of its names; where there is none, the error has the commonest."""
    return fields.positive(next((name for name in names if fields.get(name) is not None), names[0]))


def _or(fields: Fields, name: str, default: int) -> int:
    try:
        return fields.positive(name, default=default)
    except CheckpointError:  # of one number for each layer, say
        return default
