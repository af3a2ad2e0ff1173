"""The sizes at which decode steps are captured: how many sequences, and how many KV blocks of each.

A captured step is one for a fixed number of sequences, each with a table of a fixed width. A step
in between is padded to the next size, so few sizes stand for all: batches by powers of two up to 8
and then by eights, where a padded row costs a GPU nothing that is not there already; tables by
powers of two, since kernels read no further than a sequence is long.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Bucket", "bucket_for", "buckets", "largest"]

_NARROWEST = 8
"""Blocks in the smallest table; kernels may read so many entries at once (see `ragged.py`)."""
_STEP = 8


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size to which a decode step is padded.

    Attributes:
        sequences: Rows of the batch, one token each.
        blocks: KV blocks in each row's table.
    """

    sequences: int
    blocks: int

    @property
    def numbers(self) -> int:
        """How many numbers such a step is told: token, position and prompt, and a table, a row."""
        return self.sequences * (3 + self.blocks)

    def __str__(self) -> str:
        return f"{self.sequences} x {self.blocks} blocks"


def bucket_for(sequences: int, blocks: int, most: int) -> Bucket | None:
    """The smallest bucket for a step; None where there is none.

    Args:
        sequences: Rows that it has, at least 1.
        blocks: KV blocks that the longest of them has.
        most: Rows of the largest batch.
    """
    if sequences > most:
        return None
    sizes = _batches(most)
    return Bucket(sizes[bisect_left(sizes, sequences)], _width(blocks))


def buckets(most: int, context_blocks: int, kv_blocks: int) -> tuple[Bucket, ...]:
    """All buckets that steps can come to need, those first whose steps are shortest.

    What a step takes that is no kernel's own work is the same for all, so a short step gains most
    by being captured.

    Args:
        most: Rows of the largest batch.
        context_blocks: KV blocks of the model's longest sequence.
        kv_blocks: All blocks that there are: no step needs a bucket whose least batch has more.
    """
    found = [
        Bucket(rows, blocks)
        for fewest, rows in _ranges(_batches(most))
        for least, blocks in _ranges(_widths(context_blocks))
        if fewest * least <= kv_blocks
    ]
    return tuple(sorted(found, key=lambda bucket: (bucket.sequences * bucket.blocks, bucket)))


def largest(most: int, context_blocks: int) -> Bucket:
    """The bucket that holds every step."""
    return Bucket(most, _width(context_blocks))


@lru_cache
def _batches(most: int) -> tuple[int, ...]:
    sizes = [size for size in (1, 2, 4, *range(_STEP, most, _STEP)) if size < most]
    return (*sizes, most)


def _widths(context_blocks: int) -> tuple[int, ...]:
    widths = [_NARROWEST]
    while widths[-1] < context_blocks:
        widths.append(2 * widths[-1])
    return tuple(widths)


def _width(blocks: int) -> int:
    return max(_NARROWEST, 1 << (blocks - 1).bit_length())


def _ranges(sizes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """The least that is padded to each size, and the size."""
    least = 1
    for size in sizes:
        yield least, size
        least = size + 1
