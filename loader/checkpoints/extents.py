"""Extents: what is read in one go, and where its bytes go in the arena.

A read has a cost of its own, on a disk and more so over a network. So neighbours are read together
where what lies between them costs less to read than to skip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coldframe.loader.checkpoints.slices import Part

__all__ = ["MAX_GAP", "MAX_ROWS", "Extent", "Run", "coalesce"]

MAX_GAP = 64 << 10
"""Bytes that are cheaper to read than to skip."""

MAX_ROWS = 1024
"""Reads that a tensor may be taken apart into; with more, the plan itself becomes the cost."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of an extent that lie together in the arena: a tensor, several, or rows of one.

    Attributes:
        offset: Where they begin, from the start of the extent.
        length: Bytes of one row; never 0.
        arena_offset: Where the first byte goes, from the start of the arena.
        count: Rows; 1 for all that is not a slice by columns.
        stride: From row to row in the extent, in bytes. In the arena the rows touch.
    """

    offset: int
    length: int
    arena_offset: int
    count: int = 1
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of one shard that are read in one go.

    Attributes:
        stage: The index of its stage.
        shard: The index of its shard in the checkpoint.
        file_offset: The position of its first byte in the file.
        length: Bytes; never 0.
        runs: Where they go, in the order of the file. Bytes that are in no run go nowhere.
    """

    stage: int
    shard: int
    file_offset: int
    length: int
    runs: tuple[Run, ...]


def coalesce(
    parts: Sequence[Part],
    stage_of: Mapping[str, int],
    offsets: Mapping[str, int],
    max_gap: int,
    *,
    mirror: bool,
) -> list[Extent]:
    """Joins neighbours of one stage.

    Since `parts` holds all that any stage wants, what lies between two neighbours in it is wanted
    by none.

    Args:
        parts: What to read of each tensor, in the order of shards and offsets.
        stage_of: The stage of each tensor, by name.
        offsets: The place of each part in the arena, by the tensor's name.
        max_gap: The most bytes between two neighbours, or two rows of a slice by columns, that are
            read together.
        mirror: Whether the arena is laid out as the file is, gaps included.

    Returns:
        Extents in the order of shards and offsets.
    """
    extents: list[Extent] = []
    for part, place in _reads(parts, offsets, max_gap):
        stage = stage_of[part.name]
        if extents:
            last = extents[-1]
            gap = part.offset - (last.file_offset + last.length)
            if (last.stage, last.shard) == (stage, part.shard) and gap <= max_gap:
                offset = part.offset - last.file_offset
                run = Run(offset, part.length, place, part.count, part.stride)
                runs, length = _joined(last.runs, run, mirror), last.length + gap + part.span
                extents[-1] = Extent(stage, last.shard, last.file_offset, length, runs)
                continue
        run = Run(0, part.length, place, part.count, part.stride)
        extents.append(Extent(stage, part.shard, part.offset, part.span, (run,)))
    return extents


def _reads(
    parts: Sequence[Part], offsets: Mapping[str, int], max_gap: int
) -> Iterator[tuple[Part, int]]:
    """Parts with bytes and their places; as single rows, where the gaps between them are wide."""
    for part in parts:
        place = offsets[part.name]
        if part.nbytes == 0:
            continue
        if part.stride - part.length > max_gap and part.count <= MAX_ROWS:
            for index, row in enumerate(part.rows()):
                yield row, place + index * row.length
        else:
            yield part, place


def _joined(runs: tuple[Run, ...], run: Run, mirror: bool) -> tuple[Run, ...]:
    """The runs with one more behind them, as one with the last where that comes to the same.

    What lies in a gap goes nowhere, since its place in the arena may be another tensor's; but where
    the arena mirrors the file it has a place there, and goes along.
    """
    last = runs[-1]
    plain = last.count == run.count == 1
    touch = last.offset + last.length == run.offset
    congruent = last.arena_offset - last.offset == run.arena_offset - run.offset
    if plain and congruent and (touch or mirror):
        length = run.offset + run.length - last.offset
        return (*runs[:-1], Run(last.offset, length, last.arena_offset))
    return (*runs, run)
