"""RoPE's settings as a config gives them: kinds, defaults and refusals; torch-free.

Two spellings are read: `rope_theta` beside `rope_scaling`, and the `rope_parameters` of
Transformers 5. Which wins, and every default, follows `modeling_rope_utils` of Transformers 5.23.
The frequencies themselves are computed in `rope.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from coldframe.loader.errors import UnsupportedModel
from coldframe.runtime.engine.fields import Fields

__all__ = ["RopeSpec"]

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

_MOST_FACTOR = 1e4
"""The largest in use is below 100; the frequencies are float32, and there is 1 to tell from it."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How positions turn into angles.

    Attributes:
        kind: `default`, `linear`, `dynamic`, `llama3` or `yarn`.
        theta: The base of the wavelengths.
        max_position: `max_position_embeddings`; dynamic scaling starts beyond it.
        factor: By how much the context is stretched.
        original_max_position: The context before it was stretched (llama3, yarn).
        low_freq_factor, high_freq_factor: Where llama3 starts and stops to interpolate.
        beta_fast, beta_slow, truncate: The ramp of yarn.
        attention_factor: What cos and sin are multiplied by (yarn; else 1).
        context_length: The context that the scaling makes room for, in tokens.
    """

    kind: str
    theta: float
    max_position: int
    context_length: int
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def steady_tokens(self, prompt_tokens: int) -> int:
        """How many first tokens have keys that any longer request with the same tokens has, too.

        Under dynamic scaling that ends where scaling begins; see `Rope.cos_sin`.
        """
        if self.kind == "dynamic":
            return self.max_position if prompt_tokens <= self.max_position else 0
        return self.context_length

    @classmethod
    def from_config(cls, config: Fields, head_dim: int, max_position: int) -> RopeSpec:
        """Reads the RoPE keys of a whole config.

        Raises:
            UnsupportedModel: A kind that the engine does not compute, or RoPE on part of a head.
            CheckpointError: A key is missing or absurd.
        """
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        fields = Fields(config.get(key) or {}, f"{config.where}: {key}")
        kind = fields.text("rope_type") or fields.text("type") or "default"
        where = f"{fields.where}: rope_type"
        if any(isinstance(value, dict) for value in fields.values.values()):
            raise UnsupportedModel(
                "RoPE that differs between layers is not supported", where=fields.where
            )
        if kind not in _KINDS:
            raise UnsupportedModel(
                "this kind of RoPE is not supported",
                where=where,
                expected=", ".join(_KINDS),
                got=kind,
            )
        for owner in (fields, config):
            if owner.get("partial_rotary_factor") not in (None, 1):
                raise UnsupportedModel(
                    "RoPE on part of a head is not supported",
                    where=f"{owner.where}: partial_rotary_factor",
                    expected=1,
                    got=owner.get("partial_rotary_factor"),
                )
        if fields.get("mrope_section") is not None:
            raise UnsupportedModel("multimodal RoPE is not supported", where=fields.where)
        theta = fields.number("rope_theta", default=config.number("rope_theta", default=10000.0))
        spec = cls(kind, theta, max_position, context_length=max_position)
        if kind == "default":
            return spec
        if kind == "yarn":
            return _yarn(spec, fields, config)
        spec = replace(spec, factor=fields.number("factor", most=_MOST_FACTOR))
        if kind == "llama3":
            return _llama3(spec, fields, config)
        if kind == "dynamic" and head_dim <= 2:
            raise config.error("head_dim", "more than 2 for dynamic RoPE", head_dim)
        return replace(spec, context_length=max(max_position, int(max_position * spec.factor)))


def _original_max_position(spec: RopeSpec, fields: Fields, config: Fields) -> int:
    # The key beside the RoPE settings wins over the one among them.
    inner = fields.positive("original_max_position_embeddings", default=spec.max_position)
    return config.positive("original_max_position_embeddings", default=inner)


def _llama3(spec: RopeSpec, fields: Fields, config: Fields) -> RopeSpec:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if high <= low:
        raise fields.error("high_freq_factor", f"more than low_freq_factor {low}", high)
    original = _original_max_position(spec, fields, config)
    return replace(spec, original_max_position=original, low_freq_factor=low, high_freq_factor=high)


def _yarn(spec: RopeSpec, fields: Fields, config: Fields) -> RopeSpec:
    original = _original_max_position(spec, fields, config)
    factor = fields.number("factor", default=spec.max_position / original, most=_MOST_FACTOR)
    if spec.theta <= 1:
        raise config.error("rope_theta", "more than 1 for yarn", spec.theta)
    attention_factor = fields.optional_number("attention_factor")
    if attention_factor is None:
        over, under = fields.optional_number("mscale"), fields.optional_number("mscale_all_dim")
        attention_factor = _mscale(factor, 1.0)
        if over and under:
            attention_factor = _mscale(factor, over) / _mscale(factor, under)
    return replace(
        spec,
        factor=factor,
        original_max_position=original,
        beta_fast=fields.number("beta_fast", default=32.0),
        beta_slow=fields.number("beta_slow", default=1.0),
        truncate=fields.flag("truncate", default=True),
        attention_factor=attention_factor,
        context_length=max(spec.max_position, int(original * factor)),
    )


def _mscale(factor: float, mscale: float) -> float:
    """Equation 22 of the YaRN paper (arXiv 2309.00071), as 0.1 ln(s) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
