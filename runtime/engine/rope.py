"""Rotary position embedding: the frequencies of each kind, and the rotation itself.

The arithmetic follows `modeling_rope_utils` of Transformers 5.23 in float32, step by step, so that
logits agree to rounding. Settings are read in `ropespec.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from coldframe.runtime.engine.ropespec import RopeSpec

__all__ = ["Rope", "rotate"]


class Rope:
    """Turns positions into cosines and sines.

    Args:
        spec: The settings.
        head_dim: Dimensions of a head, all of which are rotated.
        device: Where the frequencies live.
    """

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device | str = "cpu") -> None:
        self.spec = spec
        self.head_dim = head_dim
        # On the CPU, wherever they are used: a GPU's powers differ in the last bit, and KV is kept
        # for longer than a device.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._exponents = exponents.to(device)
        self._inv_freq = _inverse_frequencies(spec, head_dim, exponents).to(device)

    def move(self, keep: Callable[[Tensor], Tensor]) -> None:
        """Has what it computes from lie somewhere else from now on.

        Args:
            keep: Makes a copy there.
        """
        self._exponents, self._inv_freq = keep(self._exponents), keep(self._inv_freq)

    def cos_sin(
        self, positions: Tensor, prompt_lengths: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The rotation of each token, for `rotate`.

        Under dynamic scaling the base grows with the sequence: a token at position p of a request
        with a prompt of P tokens is rotated for a sequence of max(P, p + 1) tokens. That is what a
        prefill at once and a decode one by one do, whatever chunks they really come in, so that
        keys computed again are the same keys.

        Args:
            positions: `[T]` int64.
            prompt_lengths: `[T]` int64, each token's P; read under dynamic scaling only.
            dtype: Of the result; the angles are float32.

        Returns:
            `[T, 1, head_dim]` cosines, and sines whose first half is negated (see `rotate`).
        """
        if self.spec.kind == "dynamic":
            inv_freq = self._dynamic(torch.maximum(prompt_lengths, positions + 1))
        else:
            inv_freq = self._inv_freq
        angles = positions[:, None].float() * inv_freq
        cos = (angles.cos() * self.spec.attention_factor).to(dtype)
        sin = (angles.sin() * self.spec.attention_factor).to(dtype)
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def _dynamic(self, lengths: Tensor) -> Tensor:
        """NTK-aware scaling for sequences of `lengths` `[T]` tokens: `[T, head_dim / 2]`."""
        spec, dim = self.spec, self.head_dim
        lengths = lengths.clamp(min=spec.max_position)
        stretch = (spec.factor * lengths / spec.max_position) - (spec.factor - 1)
        base = spec.theta * stretch ** (dim / (dim - 2))
        inv_freq: Tensor = 1.0 / (base[:, None] ** self._exponents)
        return inv_freq


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of each head.

    (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin). With the minus already in the sines, the
    second term is x with its halves swapped, times them: two passes instead of five.

    Args:
        x: `[T, heads, head_dim]`.
        cos, sin: `[T, 1, head_dim]`, from `Rope.cos_sin`.

    Returns:
        `[T, heads, head_dim]`, of x's dtype.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _inverse_frequencies(spec: RopeSpec, dim: int, exponents: Tensor) -> Tensor:
    inv_freq: Tensor = 1.0 / (spec.theta**exponents)
    if spec.kind == "linear":
        return inv_freq / spec.factor
    if spec.kind == "llama3":
        return _llama3(spec, inv_freq)
    if spec.kind == "yarn":
        return _yarn(spec, dim, spec.theta**exponents)
    return inv_freq


def _llama3(spec: RopeSpec, inv_freq: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    wavelength = 2 * math.pi / inv_freq
    low = spec.original_max_position / spec.low_freq_factor
    high = spec.original_max_position / spec.high_freq_factor
    blend = (spec.original_max_position / wavelength - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - blend) * inv_freq / spec.factor + blend * inv_freq
    ends = torch.where(wavelength > low, inv_freq / spec.factor, inv_freq)
    return torch.where((wavelength >= high) & (wavelength <= low), blended, ends)


def _yarn(spec: RopeSpec, dim: int, pos_freqs: Tensor) -> Tensor:
    """A ramp between interpolated and original frequencies (arXiv 2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original context."""
        turns = spec.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(dim // 2, dtype=torch.float32, device=pos_freqs.device)
    original = 1 - torch.clamp((steps - low) / (high - low), 0, 1)
    return 1.0 / (spec.factor * pos_freqs) * (1 - original) + 1.0 / pos_freqs * original
