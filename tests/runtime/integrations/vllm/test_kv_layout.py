"""Layouts of KV caches found out by trying, with ways to write that are not vLLM's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.integrations.vllm.kv_layout import learn

HEADS, TOKENS, DIM = 2, 32, 48


def side_by_side(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    blocks, offsets = slots // TOKENS, slots % TOKENS
    cache[blocks, :, offsets, :DIM] = k
    cache[blocks, :, offsets, DIM:] = v


def in_pairs(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Keys transposed, two dimensions of a token beside one another."""
    both = cache.view(len(cache), HEADS, 2, TOKENS * DIM)
    keys = both[:, :, 0].unflatten(-1, (DIM // 2, TOKENS, 2))
    values = both[:, :, 1].unflatten(-1, (TOKENS, DIM))
    for index, slot in enumerate(slots.tolist()):
        keys[slot // TOKENS, :, :, slot % TOKENS] = k[index].view(HEADS, DIM // 2, 2)
        values[slot // TOKENS, :, slot % TOKENS] = v[index]


def shuffled(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    order = torch.randperm(2 * DIM, generator=torch.Generator().manual_seed(3))
    both = torch.cat((k, v), dim=-1)
    cache[slots // TOKENS, :, slots % TOKENS] = both[..., order]


def rounded(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    side_by_side((k / 4).round() * 4, v, cache, slots)


def noisy(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Whole numbers come through, others do not."""
    side_by_side(k.round(), v, cache, slots)


def next_door(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    side_by_side(k, v, cache, slots - 1)


def cache_of(dtype: torch.dtype) -> Tensor:
    return torch.full((5, HEADS, TOKENS, 2 * DIM), 9, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("write", "views"), [(side_by_side, True), (in_pairs, True), (shuffled, False)]
)
def test_what_was_written_is_read(write, views: bool, dtype: torch.dtype) -> None:
    cache = cache_of(dtype)
    layout = learn(write, cache, HEADS, DIM, TOKENS, dtype)
    assert bool((cache == 9).all())  # it was not touched
    assert [view is not None for view in layout.views] == [views, views]
    drawn = torch.randn((2, 3 * TOKENS, HEADS, DIM)).to(dtype)
    blocks = torch.tensor([4, 0, 2])
    slots = (blocks[:, None] * TOKENS + torch.arange(TOKENS)).view(-1)
    write(drawn[0], drawn[1], cache, slots)
    k, v = layout.read(cache, blocks)
    assert torch.equal(k, drawn[0])
    assert torch.equal(v, drawn[1])


@pytest.mark.parametrize("write", [rounded, noisy, next_door])
def test_what_is_not_kept_as_it_is_is_refused(write) -> None:
    with pytest.raises(ReplicaError, match="kv-cache-dtype auto"):
        learn(write, cache_of(torch.bfloat16), HEADS, DIM, TOKENS, torch.bfloat16)
