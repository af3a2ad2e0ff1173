"""What a compiled decode step is for: all of a model and a process that is fixed in its code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from coldframe.loader.errors import UnsupportedModel
from coldframe.runtime.engine.spec import ModelSpec, TensorLike

__all__ = ["LEAST_KEYS", "MOST_KEYS", "CodeShape"]

LEAST_KEYS, MOST_KEYS = 2, 1 << 20
"""How many keys a token may look at."""


@dataclass(frozen=True, slots=True)
class CodeShape:
    """The shape of one layer and of the head; models that differ in depth alone share it.

    Args:
        dtype: Of matrices, keys and values: safetensors' name.
        vectors: Of norms and biases.
        threads: That the loops are divided among.
    """

    dtype: str
    vectors: str
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    threads: int

    @classmethod
    def of(cls, spec: ModelSpec, vectors: str, threads: int) -> CodeShape:
        """A model's, where it is known of what dtype its norms and biases are."""
        own = {"dtype", "vectors", "threads"}
        same = {f.name: getattr(spec, f.name) for f in fields(cls) if f.name not in own}
        return cls(dtype=spec.dtype, vectors=vectors, threads=threads, **same)

    @classmethod
    def of_tensors(
        cls, spec: ModelSpec, tensors: Mapping[str, TensorLike], threads: int
    ) -> CodeShape:
        """A model's, by its tensors.

        Raises:
            UnsupportedModel: Its norms and biases are of several dtypes.
        """
        shapes = spec.expected_tensors()
        vectors = sorted({tensors[name].dtype for name, shape in shapes.items() if len(shape) == 1})
        if len(vectors) > 1:
            raise UnsupportedModel(
                "a decode step is compiled for one dtype of norms and biases",
                expected=spec.dtype,
                got=", ".join(vectors),
            )
        return cls.of(spec, vectors[0], threads)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CodeShape:
        """What `to_json` has made.

        Raises:
            TypeError: Something is missing, or too much.
        """
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def difference(self, other: CodeShape) -> str | None:
        """The first thing that is not the same, for people."""
        for name in (field.name for field in fields(self)):
            own, its = getattr(self, name), getattr(other, name)
            if own != its:
                return f"compiled for {name} {own}, here it is {its}"
        return None
