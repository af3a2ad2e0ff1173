"""A model's weights by what they are for, as views of memory that somebody else owns.

Everything here is made from names, shapes and addresses. No weight is read, so the memory may
still be filling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from coldframe.runtime.engine.linear import Projections
from coldframe.runtime.engine.spec import ModelSpec

__all__ = ["LayerWeights", "Weights"]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights; what the model does not have is None."""

    attention_norm: Tensor
    qkv: Projections
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Projections
    down: Tensor
    down_bias: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], spec: ModelSpec, index: int) -> LayerWeights:
        """The weights of layer `index`, by their names in the checkpoint."""
        prefix = f"model.layers.{index}."
        wanted = spec.layer_tensors(index)

        def get(name: str) -> Tensor | None:
            return tensors[prefix + name] if prefix + name in wanted else None

        def projections(*names: str) -> Projections:
            biases = [bias for name in names if (bias := get(f"{name}_proj.bias")) is not None]
            return Projections([tensors[f"{prefix}{name}_proj.weight"] for name in names], biases)

        return cls(
            attention_norm=tensors[prefix + "input_layernorm.weight"],
            qkv=projections("self_attn.q", "self_attn.k", "self_attn.v"),
            q_norm=get("self_attn.q_norm.weight"),
            k_norm=get("self_attn.k_norm.weight"),
            o=tensors[prefix + "self_attn.o_proj.weight"],
            o_bias=get("self_attn.o_proj.bias"),
            mlp_norm=tensors[prefix + "post_attention_layernorm.weight"],
            gate_up=projections("mlp.gate", "mlp.up"),
            down=tensors[prefix + "mlp.down_proj.weight"],
            down_bias=get("mlp.down_proj.bias"),
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model. With tied embeddings, `head` is `embedding`."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], spec: ModelSpec) -> Weights:
        """The weights by their names in the checkpoint, as `ModelSpec.check` accepts them."""
        embedding = tensors["model.embed_tokens.weight"]
        return cls(
            embedding=embedding,
            layers=tuple(LayerWeights.of(tensors, spec, index) for index in range(spec.layers)),
            norm=tensors["model.norm.weight"],
            head=embedding if spec.tied else tensors["lm_head.weight"],
        )
