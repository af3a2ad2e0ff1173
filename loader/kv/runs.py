"""Blocks that lie beside one another, as runs: what is copied at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["Run", "cut", "deal", "places_of", "portions", "runs_of", "stretches_of"]

Run = tuple[int, int, int]
"""Neighbouring blocks: the first here, the first in the order of those there, and how many."""


def runs_of(blocks: Sequence[int], first: int, end: int) -> list[Run]:
    """Neighbours among a request's blocks here, as runs.

    Args:
        blocks: All that it has here, in order.
        first: The first that is wanted.
        end: Behind the last.
    """
    runs: list[Run] = []
    for place in range(first, end):
        if runs:
            here, there, count = runs[-1]
            if here + count == blocks[place]:
                runs[-1] = (here, there, count + 1)
                continue
        runs.append((blocks[place], place, 1))
    return runs


def places_of(blocks: Sequence[int], first: int, end: int) -> list[tuple[int, int]]:
    """Where those are: the first block of each run, and how many; see `runs_of`."""
    return [(here, count) for here, _, count in runs_of(blocks, first, end)]


def stretches_of(
    runs: Sequence[Run], blocks: Sequence[int], block_bytes: int
) -> list[tuple[int, int, int]]:
    """Where bytes go, where they come from and how many, neighbours on both sides as one.

    Args:
        runs: Blocks here, and their places among those there.
        blocks: Those there, in order.
        block_bytes: Of one.
    """
    found: list[tuple[int, int, int]] = []
    for here, there, count in runs:
        for step in range(count):
            to, source = (here + step) * block_bytes, blocks[there + step] * block_bytes
            if found:
                last_to, last_source, length = found[-1]
                if (last_to + length, last_source + length) == (to, source):
                    found[-1] = (last_to, last_source, length + block_bytes)
                    continue
            found.append((to, source, block_bytes))
    return found


def portions(
    stretches: Sequence[tuple[int, int, int]], most: int
) -> Iterator[list[tuple[int, int, int]]]:
    """The same bytes, so many at once; what is longer is cut.

    Args:
        stretches: As `stretches_of` gives them.
        most: Bytes of a portion, at most.
    """
    portion: list[tuple[int, int, int]] = []
    room = most
    for to, source, length in stretches:
        while length:
            some = min(length, room)
            portion.append((to, source, some))
            to, source, length, room = to + some, source + some, length - some, room - some
            if not room:
                yield portion
                portion, room = [], most
    if portion:
        yield portion


def cut(block: int, count: int, block_bytes: int, most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring blocks in pieces: the offset of each in the arena, and its length in bytes.

    Args:
        block: The first.
        count: How many.
        block_bytes: Of one.
        most: Bytes of a piece, at most.
    """
    start, end = block * block_bytes, (block + count) * block_bytes
    for offset in range(start, end, most):
        yield offset, min(most, end - offset)


def deal(runs: Sequence[Run], count: int) -> list[list[Run]]:
    """Runs dealt out to so many, each about the same number of blocks."""
    total = sum(blocks for _, _, blocks in runs)
    each = -(-total // count)
    parts: list[list[Run]] = [[]]
    room = each
    for here, there, blocks in runs:
        while blocks:
            if not room:
                parts.append([])
                room = each
            some = min(blocks, room)
            parts[-1].append((here, there, some))
            here, there, blocks, room = here + some, there + some, blocks - some, room - some
    return parts
