"""A batch as one call over all its sequences takes it: where each begins, and how far it reaches.

Kernels of this kind want 32-bit numbers, and sequences side by side without padding; they see to
masks themselves. See `varlen.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from coldframe.runtime.engine.batch import Chunk

__all__ = ["Ragged"]

_AHEAD = 8
"""Entries of a row that a kernel may read at once, whether it needs them or not."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """S sequences, all tensors int32.

    Attributes:
        starts: `[S + 1]`, where each sequence's tokens begin in the batch, and the end.
        lengths: `[S]`, tokens that its last token sees without a window: what is in the KV by then.
        table: `[S, n]`, the blocks of each; the rest of a row repeats the first one. n is a
            multiple of 8, so that a kernel which reads a few entries ahead finds blocks there.
        blocks: `[N]`, the blocks of all of them, one sequence behind the other.
        block_starts: `[S + 1]`, where each sequence's begin there, in tokens, and the end.
        longest: Tokens of the longest sequence in this batch.
        furthest: The largest of the lengths.
        alone: Whether all sequences start here, so that the batch has all their keys itself.
    """

    starts: Tensor
    lengths: Tensor
    table: Tensor
    blocks: Tensor
    block_starts: Tensor
    longest: int
    furthest: int
    alone: bool

    @staticmethod
    def numbers(chunks: Sequence[Chunk], block_tokens: int) -> list[int]:
        """All its numbers in a row, for `of`."""
        ends = _ends(chunks)
        tables = _tables(chunks, block_tokens)
        width = _width(tables)
        sizes = [len(table) * block_tokens for table in tables]
        return [
            *accumulate((len(chunk.token_ids) for chunk in chunks), initial=0),
            *ends,
            *chain.from_iterable(t + t[:1] * (width - len(t)) for t in tables),
            *chain.from_iterable(tables),
            *accumulate(sizes, initial=0),
        ]

    @classmethod
    def of(cls, chunks: Sequence[Chunk], block_tokens: int, numbers: Tensor) -> Ragged:
        """From those numbers on a device, `[n]` int64."""
        count, tables = len(chunks), _tables(chunks, block_tokens)
        width, blocks = _width(tables), sum(map(len, tables))
        starts, lengths, table, flat, block_starts = torch.split(
            numbers.int(), [count + 1, count, count * width, blocks, count + 1]
        )
        return cls(
            starts,
            lengths,
            table.view(count, width),
            flat,
            block_starts,
            longest=max(len(chunk.token_ids) for chunk in chunks),
            furthest=max(_ends(chunks)),
            alone=all(chunk.start == 0 for chunk in chunks),
        )


def _width(tables: Sequence[Sequence[int]]) -> int:
    return -(-max(map(len, tables)) // _AHEAD) * _AHEAD


def _ends(chunks: Sequence[Chunk]) -> list[int]:
    return [chunk.start + len(chunk.token_ids) for chunk in chunks]


def _tables(chunks: Sequence[Chunk], block_tokens: int) -> list[list[int]]:
    ends = _ends(chunks)
    return [
        list(chunk.blocks[: -(-end // block_tokens)])
        for chunk, end in zip(chunks, ends, strict=True)
    ]
