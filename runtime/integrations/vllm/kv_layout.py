"""Where an attention backend puts keys and values in a block of its cache, found out by trying.

A backend has a way to write keys and values (`do_kv_cache_update`) and none to read them back, and
where in a block it puts a number is its own affair: it depends on the backend, and on a CPU on the
instruction set (keys transposed, or interleaved in pairs). So each number of a block is given a
name, written into a cache of two blocks in digits that any dtype of 16 bits holds exactly, and
looked up. What that finds must be a permutation, and must bring random numbers back bit by bit;
where it does not, as where a cache quantises, reading is refused.

On the layouts that are known the place of a number is a sum of what its token, its head and its
dimension add, each in steps. Then a block is read through a view of as many dimensions, copied by
torch in one go; else number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coldframe.loader.errors import ReplicaError

__all__ = ["KvLayout", "View", "Write", "learn"]

Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Writes k and v, each `[T, kv_heads, head_dim]`, into a cache at slots `[T]` int64: (k, v, cache,
slots)."""

_DIGITS = 200
"""Digits 1 to this are exact in bf16, fp16 and fp32, and zero is what was not written to."""


@dataclass(frozen=True, slots=True)
class View:
    """A block's keys, or its values, as a view of the block laid flat.

    Args:
        start: The place of the first number.
        shape: Sizes in canonical order.
        strides: In numbers.
    """

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """How a block of a backend's cache holds keys and values.

    Args:
        places: `[2, tokens, heads, dim]` int64: of each number of keys, then of values, its place
            in a block that is laid flat.
        views: Of the keys and of the values, where there are such.
    """

    places: Tensor
    views: tuple[View | None, View | None] = (None, None)

    @property
    def block_tokens(self) -> int:
        return self.places.shape[1]

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks.

        Args:
            cache: `[B, ...]`, as the backend has it.
            blocks: `[n]` int64, of them.

        Returns:
            k and v, each `[n * tokens, heads, dim]`, copies.
        """
        flat = cache.index_select(0, blocks).reshape(len(blocks), -1)
        return self._part(flat, 0), self._part(flat, 1)

    def _part(self, flat: Tensor, part: int) -> Tensor:
        view, places = self.views[part], self.places[part]
        if view is None:
            found = flat.index_select(1, places.reshape(-1))
        else:
            size, strides = (len(flat), *view.shape), (flat.shape[1], *view.strides)
            found = flat.as_strided(size, strides, view.start)
        return found.reshape(-1, *places.shape[1:])


def learn(
    write: Write, cache: Tensor, heads: int, dim: int, tokens: int, dtype: torch.dtype
) -> KvLayout:
    """Finds out how a backend lays out its blocks.

    Args:
        write: Its way to write; it may write to the slots that it is given alone.
        cache: One of its caches, `[B, ...]` with a block for each index of the first dimension. It
            is not touched.
        heads, dim: Of the keys and values it gets.
        tokens: In a block.
        dtype: Of keys and values; the cache may be of another.

    Raises:
        ReplicaError: It does not hold them as they are written.
    """
    numbers = 2 * tokens * heads * dim
    names = torch.zeros(_scratch(cache)[1].numel(), dtype=torch.int64, device=cache.device)
    every = torch.arange(numbers, device=cache.device)
    power = 1
    while power <= numbers:
        digits = every // power % _DIGITS
        made = (digits + 1).view(2, tokens, heads, dim).to(dtype)
        found = _written(write, cache, made)
        names += (found.round().to(torch.int64) - 1).clamp(min=-1) * power
        # What no digit was written to has no name: it stays below zero, whatever is added.
        names[found == 0] = -(1 << 60)
        power *= _DIGITS
    held = (names >= 0).nonzero().view(-1)
    if len(held) != numbers or not torch.equal(names[held].sort().values, every):
        raise _refused(cache, f"{numbers} numbers, each in a place of its own", f"{len(held)}")
    places = torch.empty(numbers, dtype=torch.int64, device=cache.device)
    places[names[held]] = held
    found = places.view(2, tokens, heads, dim)
    layout = KvLayout(found, (_view(found[0]), _view(found[1])))
    _try_out(write, cache, layout, dtype)
    return layout


def _scratch(cache: Tensor) -> Tensor:
    """Two empty blocks, laid out as those of a cache."""
    order = sorted(range(1, cache.dim()), key=cache.stride, reverse=True)
    made = torch.zeros(
        (2, *(cache.shape[i] for i in order)), dtype=cache.dtype, device=cache.device
    )
    return made.permute(0, *(1 + order.index(i) for i in range(1, cache.dim())))


def _written(write: Write, cache: Tensor, numbers: Tensor) -> Tensor:
    """The second of two blocks laid flat, with these numbers in it, as floats."""
    scratch = _scratch(cache)
    tokens = numbers.shape[1]
    slots = torch.arange(tokens, 2 * tokens, device=cache.device)
    k, v = numbers.unbind()
    write(k.contiguous(), v.contiguous(), scratch, slots)
    if bool((scratch[0] != 0).any()):
        raise _refused(cache, "a slot's numbers in the slot's own block", "numbers in another one")
    return scratch[1].reshape(-1).float()


def _view(places: Tensor) -> View | None:
    """The view of these places, where they add up from those along each axis."""
    places = places.cpu()
    total = first = places[0, 0, 0]
    shape: list[int] = []
    strides: list[int] = []
    for axis in range(3):
        along = places.transpose(0, axis)[:, 0, 0] if axis else places[:, 0, 0]
        parts = _radix((along - first).tolist())
        if parts is None or any(stride < 0 for _, stride in parts):
            return None
        shape += [size for size, _ in parts]
        strides += [stride for _, stride in parts]
        wide = [1, 1, 1]
        wide[axis] = len(along)
        total = total + (along - first).view(wide)
    return View(int(first), tuple(shape), tuple(strides)) if torch.equal(total, places) else None


def _radix(along: list[int]) -> list[tuple[int, int]] | None:
    """Sizes and strides, slowest first, by which places along an axis are reached, if there are."""
    if len(along) == 1:
        return []
    stride, run = along[1], 1
    while run < len(along) and along[run] == run * stride:
        run += 1
    if len(along) % run:
        return None
    rest = _radix(along[::run])
    if rest is None:
        return None
    if any(along[i] != along[i - i % run] + i % run * stride for i in range(len(along))):
        return None
    return [*rest, (run, stride)]


def _try_out(write: Write, cache: Tensor, layout: KvLayout, dtype: torch.dtype) -> None:
    """Writes random numbers and reads them back.

    Raises:
        ReplicaError: They are not the same.
    """
    generator = torch.Generator().manual_seed(1)
    shape = tuple(layout.places.shape)
    drawn = torch.randn((2, *shape), generator=generator).to(cache.device, dtype)
    scratch = _scratch(cache)
    tokens = layout.block_tokens
    keys, values = (drawn[:, i].reshape(-1, *shape[2:]).contiguous() for i in (0, 1))
    write(keys, values, scratch, torch.arange(2 * tokens, device=cache.device))
    back = layout.read(scratch, torch.arange(2, device=cache.device))
    if not (torch.equal(back[0], keys) and torch.equal(back[1], values)):
        raise _refused(cache, "random numbers as they were written", "others")


def _refused(cache: Tensor, expected: str, got: str) -> ReplicaError:
    return ReplicaError(
        "vLLM's KV cache does not hold keys and values as they are written",
        where=f"a cache of {cache.dtype}, {list(cache.shape)}",
        expected=expected,
        got=got,
        hint="Take the model's own dtype for the KV cache (--kv-cache-dtype auto).",
    )
