"""Where tensors lie in an arena: the layouts, and the packer of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import NamedTuple

from coldframe.loader.checkpoints.checkpoint import Checkpoint

__all__ = ["Item", "Layout", "Packed", "pack"]

_SHARD_ALIGNMENT = 2 << 20  # a huge page, so that a shard can lie in huge pages from its start
_ARENA_ROUNDING = 64 << 10  # the largest base page in use (arm64), so a plan fits every machine
_ALIGNMENT = 256  # what CUDA's allocator gives, and enough for every vector unit

_JOINABLE = re.compile(r"^(.*\.)(q|k|v|gate|up)_proj\.(weight|bias)$")
_JOINED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_RANKS = {role: rank for rank, role in enumerate(_JOINED)}


class Layout(StrEnum):
    """How an arena mirrors a checkpoint.

    `FILE`: each shard as it is, at a base of its own; a tensor at base + its offset in the file.
    Memory and file agree modulo every block size up to 2 MiB, so that a shard can be mapped
    whole, or read with O_DIRECT without a bounce.

    `ALIGNED`: the planned tensors alone, in the order of use, each on 256 bytes; q, k and v lie
    directly behind one another, and gate and up, so that each group runs as one linear map. The
    only layout of a tensor-parallel rank, since its slices mirror no file.
    """

    FILE = "file"
    ALIGNED = "aligned"


class Item(NamedTuple):
    """A tensor, or one rank's slice of it, that wants a place."""

    name: str
    dtype: str
    nbytes: int


class Packed(NamedTuple):
    """The places: arena offsets by name, where shards begin (`FILE`), the arena's size in bytes."""

    offsets: dict[str, int]
    shard_bases: tuple[int, ...]
    arena_bytes: int


def pack(layout: Layout, checkpoint: Checkpoint, items: Sequence[Item]) -> Packed:
    """Gives each item its place.

    Args:
        layout: How.
        checkpoint: Whose tensors they are.
        items: In the order of use.
    """
    return _PACKERS[layout](checkpoint, items)


def _pack_file(checkpoint: Checkpoint, _: Sequence[Item]) -> Packed:
    bases, end = [], 0
    for shard in checkpoint.shards:
        bases.append(_round_up(end, _SHARD_ALIGNMENT))
        end = bases[-1] + shard.size
    offsets = {t.name: bases[t.shard] + t.offset for t in checkpoint.tensors.values()}
    return Packed(offsets, tuple(bases), _round_up(end, _ARENA_ROUNDING))


def _pack_aligned(_: Checkpoint, items: Sequence[Item]) -> Packed:
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(_group_of(item), []).append(item)
    offsets, end = {}, 0
    for group in groups.values():
        # Where sizes are no multiples of the alignment, being adjacent comes first: within a matrix
        # that is run as one, no kernel cares where the rows of k begin.
        end = _round_up(end, _ALIGNMENT)
        for item in sorted(group, key=_rank_of):
            offsets[item.name] = end
            end += item.nbytes
    return Packed(offsets, (), _round_up(end, _ARENA_ROUNDING))


def _group_of(item: Item) -> tuple[str, ...]:
    """What an item shares with those that lie next to it; of most items there is only one."""
    if found := _JOINABLE.match(item.name):
        module, role, kind = found.groups()
        # Tensors of two dtypes cannot be one, and could put each other off their own alignment.
        return module, _JOINED[role], kind, item.dtype
    return (item.name,)


def _rank_of(item: Item) -> int:
    found = _JOINABLE.match(item.name)
    return _RANKS[found[2]] if found else 0


_PACKERS: dict[Layout, Callable[[Checkpoint, Sequence[Item]], Packed]] = {
    Layout.FILE: _pack_file,
    Layout.ALIGNED: _pack_aligned,
}


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
