"""A decode step of few sequences as functions of nothing but tensors, to be compiled.

One layer stands for all: its weights are arguments, so what is compiled knows no address of any,
and compiling takes as long for a model of 100 layers as for one of 4. What a batch has in common in
all layers (the rotation, where its keys lie, which of them it sees) is computed once a step, and is
an argument, too; so layers with different windows are the same function.

It is written for Inductor's loops on a CPU. A product with few rows is a sum over each row of the
weight for each row of x, next to one another: they become one loop that reads the weight once, as
fast as memory gives it, and sums in float32. The number of rows is a constant for that. What the
model rounds to its dtype is rounded here, too (the compiler has to be told to leave that in): so
answers are as near to the model's as sums in another order let them be.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.weights import LayerWeights, Weights

__all__ = ["TracedLayer", "TracedLogits", "layer_tensors", "logits_tensors"]


def layer_tensors(weights: LayerWeights) -> list[Tensor]:
    """A layer's weights in the order in which `TracedLayer` takes them."""
    w = weights
    maps = [*w.qkv.apart, (w.q_norm, None), (w.k_norm, None), (w.o, w.o_bias), (w.mlp_norm, None)]
    maps += [*w.gate_up.apart, (w.down, w.down_bias)]
    return [w.attention_norm, *(tensor for pair in maps for tensor in pair if tensor is not None)]


def logits_tensors(weights: Weights) -> list[Tensor]:
    """The weights that `TracedLogits` takes, in order."""
    return [weights.norm, weights.head]


class TracedLayer(torch.nn.Module):
    """`Model.layer` for n sequences of one token each.

    Args:
        spec: The model's shape.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._spec = spec

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor,
        seen: Tensor,
        bias: Tensor,
        cache: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        """The layer's output, `[n, hidden_size]`; the tokens' keys and values are in the cache.

        Args:
            x: `[n, hidden_size]`.
            cos, sin: `[n, 1, head_dim]`, from `Rope.cos_sin`.
            rows: `[2 n]` int64, where the tokens' own keys go, and then their values.
            seen: `[2, n, L]` int64, the rows of the keys that are looked at, and of their values.
            bias: `[n, L]` float32, 0 where a key is seen and minus infinity where it is not.
            cache: `[R, kv_heads * head_dim]`, from this layer's first row on.
            *weights: See `layer_tensors`.
        """
        spec, n, dtype = self._spec, len(x), x.dtype
        dim, eps = spec.head_dim, spec.rms_norm_eps
        of = iter(weights)
        h = _rms_norm(x, next(of), eps)
        outs = _products(h, of, 3, biased=spec.attention_bias)
        q, k, v = (torch.stack(out).view(n, -1, dim) for out in outs)
        if spec.qk_norm:
            q, k = _rms_norm(_stored(q), next(of), eps), _rms_norm(_stored(k), next(of), eps)
        q = _stored(_rotate(q, cos, sin))
        cache.index_put_((rows,), torch.cat((_rotate(k, cos, sin), v)).view(2 * n, -1))
        q = q.view(n, spec.kv_heads, -1, dim)
        attended = _stored(_attend(q, cache[seen[0]], cache[seen[1]], bias).to(dtype))
        (out,) = _products(attended, of, 1, biased=spec.output_bias)
        x = _stored(torch.stack([a + b for a, b in zip(x, out, strict=True)]))
        h = _rms_norm(x, next(of), eps)
        gate, up = _products(h, of, 2, biased=spec.mlp_bias)
        inner = torch.stack([silu(a) * b for a, b in zip(gate, up, strict=True)])
        (out,) = _products(_stored(inner), of, 1, biased=spec.mlp_bias)
        return torch.stack([a + b for a, b in zip(x, out, strict=True)])


class TracedLogits(torch.nn.Module):
    """`Model.logits` for n sequences of one token each.

    Args:
        spec: The model's shape.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._spec = spec

    def forward(self, x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
        """Logits, `[n, vocab_size]` float32.

        Args:
            x: `[n, hidden_size]`.
            norm, head: See `logits_tensors`.
        """
        h = _rms_norm(x, norm, self._spec.rms_norm_eps)
        return torch.stack(_product(h, head)).float()


def _products(x: Tensor, of: Iterator[Tensor], count: int, *, biased: bool) -> list[list[Tensor]]:
    """Linear maps of the same input: the next `count` of the weights, each with its bias."""
    maps = [(next(of), next(of) if biased else None) for _ in range(count)]
    return [_product(x, weight, bias) for weight, bias in maps]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """`x @ weight.T + bias` by rows, `[rows of the weight]` each, of x's dtype.

    Rows stay apart, so that what is made of each of them is part of the same loop.
    """
    wide = weight.float()
    sums = [(wide * row.float()).sum(-1) for row in x.unbind()]
    if bias is not None:
        sums = [out + bias.to(x.dtype).float() for out in sums]
    return [out.to(x.dtype) for out in sums]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return _stored((wide * weight.to(x.dtype).float()).to(x.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rope.rotate`, with the halves of a head as a dimension: none of its loops wraps."""
    n, heads, dim = x.shape
    halves = x.view(n, heads, 2, dim // 2)
    cos, sin = (part.view(n, 1, 2, dim // 2) for part in (cos, sin))
    first = (halves * cos).float()
    return (first + halves.flip(2).float() * sin.float()).to(x.dtype).view(n, heads, dim)


def _attend(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention of each sequence's one token, `[n, heads * head_dim]` float32.

    The heads that share keys stand next to one another, so that each key is read once for them.

    Args:
        q: `[n, kv_heads, groups, head_dim]`.
        keys, values: `[n, L, kv_heads * head_dim]`.
        bias: `[n, L]`.
    """
    n, kv_heads, groups, dim = q.shape
    dtype = q.dtype
    keys, values = (part.view(n, -1, kv_heads, dim).float() for part in (keys, values))
    q = q.float()[:, None]
    # Keys come before heads everywhere: sums over them run beside one another for all heads.
    scores = torch.stack([(keys * q[:, :, :, g]).sum(-1) for g in range(groups)], -1)
    scores = scores * dim**-0.5 + bias[:, :, None, None]
    weights = torch.exp(scores - scores.amax(1, keepdim=True))
    total = weights.sum(1)
    weights = weights.to(dtype).float()
    out = [(weights[..., g, None] * values).sum(1) / total[..., g, None] for g in range(groups)]
    return torch.stack(out, 2).reshape(n, -1)


def _stored(x: Tensor) -> Tensor:
    """The same, written to memory once instead of computed again in each loop that reads it.

    Inductor makes a norm part of every loop behind it, which is each row of a weight.
    """
    x = x.contiguous()
    return torch.as_strided(x, x.shape, x.stride())
