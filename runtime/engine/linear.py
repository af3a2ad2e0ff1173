"""Linear maps over weights in an arena: the right kernel, and several maps run as one.

Maps of the same input whose weights lie directly behind one another are one map with more rows:
one kernel instead of three reads the same bytes. Nothing says so but the addresses. The load
plan's layout `aligned` puts q, k and v next to each other, and gate and up; many checkpoints have
gate and up so in the file already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Projections", "joined", "linear"]


class Projections:
    """Linear maps of the same input, run as one where memory allows.

    Args:
        weights: `[rows, hidden]` each. They may still be filling: only their addresses are read.
        biases: `[rows]` each, one a weight, or none at all.

    Attributes:
        apart: Each weight with its bias.
        weight: The weights as one view, `[sum of rows, hidden]`; None where they are run apart.
        bias: The biases as one view, where there are any and `weight` is there.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = ()) -> None:
        self._rows = [len(weight) for weight in weights]
        without: list[Tensor | None] = [None] * len(weights)
        self.apart = list(zip(weights, biases or without, strict=True))
        self.weight = joined(weights)
        self.bias = joined(biases) if biases and self.weight is not None else None
        if biases and self.bias is None:
            # Biases could only be joined by a copy, and not before their stage is in.
            self.weight = None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Each map's output, `[T, rows]`.

        Args:
            x: `[T, hidden]`.
        """
        if self.weight is None:
            return [linear(x, weight, bias) for weight, bias in self.apart]
        return torch.split(linear(x, self.weight, self.bias), self._rows, -1)


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """One view over tensors that lie directly behind one another.

    Args:
        parts: In the order in which they should lie; of any shape.

    Returns:
        `[sum of their first dimensions, ...]`, or None where they are not contiguous, differ in
        dtype or in their other dimensions, have something between them, or do not lie in one
        storage, which a tensor cannot reach beyond.
    """
    first = parts[0]
    storage = first.untyped_storage()
    home = (storage.data_ptr(), storage.nbytes())
    end = first.storage_offset()
    for part in parts:
        storage = part.untyped_storage()
        fits = (part.dtype, part.shape[1:]) == (first.dtype, first.shape[1:])
        there = (storage.data_ptr(), storage.nbytes()) == home and part.storage_offset() == end
        if not (fits and there and part.is_contiguous()):
            return None
        end += part.numel()
    return first.as_strided((end - first.storage_offset(),), (1,)).view(-1, *first.shape[1:])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, by the kernel that reads the weight fastest.

    A step of one or two tokens is bound by reading the weights. In bfloat16 on a CPU, oneDNN packs
    each matrix before it multiplies, and reads 17 to 25 GB/s where ATen's own dot products read 40
    to 50 (two cores with AVX512-BF16, torch 2.13). From three tokens on oneDNN is the faster one.

    Args:
        x: `[T, hidden]`.
        weight: `[rows, hidden]`, of x's dtype.
        bias: `[rows]`, cast to x's dtype.

    Returns:
        `[T, rows]`.
    """
    if bias is not None:
        bias = bias.to(x.dtype)
    if len(x) > 2 or x.dtype != torch.bfloat16 or not x.is_cpu:
        return functional.linear(x, weight, bias)
    with _onednn_off():
        return functional.linear(x, weight, bias)


@contextmanager
def _onednn_off() -> Iterator[None]:
    # `torch.backends.mkldnn.flags` would do, but sets precision flags too, which warns.
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
