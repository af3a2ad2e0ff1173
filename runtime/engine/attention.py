"""Attention of a ragged batch over paged keys and values, through PyTorch's SDPA.

Three cases: a fresh prompt attends causally to its own keys without touching the cache; a chunk
with a context, or with a window that bites, gathers its blocks under an explicit mask; all
sequences of one token, decode above all, attend together in one call.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from coldframe.runtime.engine.batch import Batch
from coldframe.runtime.engine.kv import KVCache

__all__ = ["attend"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, batch: Batch, kv: KVCache, layer: int, window: int | None
) -> Tensor:
    """Attention of a batch whose keys and values are in the cache already.

    Args:
        q: `[T, heads, head_dim]`.
        k, v: `[T, kv_heads, head_dim]`, as written to the cache.
        batch: Which token belongs where.
        kv: The cache.
        layer: Which layer.
        window: How many tokens a token sees, itself included; None is all.

    Returns:
        `[T, heads, head_dim]`.
    """
    sequences = len(batch.chunks)
    if len(batch.singles) == sequences:
        return _singles(q, batch, kv, layer, window)
    if sequences == 1:
        return _sequence(q, k, v, 0, batch, kv, layer, window)
    out = torch.empty_like(q)
    if batch.singles:
        rows = batch.single_rows
        out[rows] = _singles(q[rows], batch, kv, layer, window)
    for s, (start, end) in enumerate(pairwise(batch.offsets)):
        if end - start > 1:
            part = slice(start, end)
            out[part] = _sequence(q[part], k[part], v[part], s, batch, kv, layer, window)
    return out


def _sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: int,
    batch: Batch,
    kv: KVCache,
    layer: int,
    window: int | None,
) -> Tensor:
    """One sequence of several tokens."""
    if batch.sees_itself_alone(sequence, window):
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
        if not _takes_groups(q):
            return _grouped(q, keys, values, causal=True)
        out = scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)
    reach = batch.reach(sequence, window)
    keys, values = kv.gather(layer, reach.table)
    keys, values = keys[:, :, : reach.length], values[:, :, : reach.length]
    return _grouped(q, keys, values, mask=reach.mask)


def _takes_groups(q: Tensor) -> bool:
    """Whether a kernel takes heads that share keys, and a causal mask, without writing all scores.

    On a GPU that is flash attention, which knows no float32.
    """
    return not (q.is_cuda and q.dtype == torch.float32)


def _grouped(
    q: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """One sequence, where the heads that share keys stand in for a batch.

    On a GPU no kernel takes both groups of heads and a mask, but one that writes all the scores
    down.

    Args:
        q: `[T, heads, head_dim]`.
        keys, values: `[1, kv_heads, n, head_dim]`.
        mask: True where a query sees a key.
        causal: Whether each sees those before it, where there is no mask.
    """
    count, heads, dim = q.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    grouped = q.view(count, kv_heads, groups, dim).permute(2, 1, 0, 3)
    keys, values = keys.expand(groups, -1, -1, -1), values.expand(groups, -1, -1, -1)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, is_causal=causal)
    return out.permute(2, 1, 0, 3).reshape(count, heads, dim)


def _singles(q: Tensor, batch: Batch, kv: KVCache, layer: int, window: int | None) -> Tensor:
    """Sequences of one token: the heads that share keys stand in for query positions."""
    reach = batch.single_reach(window)
    keys, values = kv.gather(layer, reach.table)
    keys, values = keys[:, :, : reach.length], values[:, :, : reach.length]
    count, heads, dim = q.shape
    grouped = q.view(count, keys.shape[1], -1, dim)
    out = scaled_dot_product_attention(grouped, keys, values, attn_mask=reach.mask)
    return out.reshape(count, heads, dim)
