from __future__ import annotations

import pytest

from coldframe.loader.checkpoints.extents import Extent, Run, coalesce
from coldframe.loader.checkpoints.slices import Part


def part(name: str, offset: int, length: int, count: int = 1, stride: int = 0) -> Part:
    return Part(name, "U8", (count, length), 0, offset, length, count, stride)


def extents(parts: list[Part], places: dict[str, int], *, mirror: bool = False) -> list[Extent]:
    return coalesce(parts, dict.fromkeys(places, 0), places, 100, mirror=mirror)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_gap_goes_along_only_where_the_arena_mirrors_the_file(mirror: bool) -> None:
    # As far apart in the arena as in the file; but there something else may lie between them.
    parts = [part("a", 1000, 10), part("b", 1030, 5)]
    (found,) = extents(parts, {"a": 0, "b": 30}, mirror=mirror)
    runs = (Run(0, 35, 0),) if mirror else (Run(0, 10, 0), Run(30, 5, 30))
    assert found == Extent(0, 0, 1000, 35, runs)


def test_a_strided_run_joins_no_other() -> None:
    parts = [part("a", 0, 8), part("b", 8, 2, 3, 4), part("c", 18, 6)]
    (found,) = extents(parts, {"a": 0, "b": 8, "c": 14})
    assert found.runs == (Run(0, 8, 0), Run(8, 2, 8, 3, 4), Run(18, 6, 14))
    assert found.length == 24


def test_single_rows_join_their_neighbours_where_the_gap_allows() -> None:
    parts = [part("a", 0, 8), part("b", 8, 2, 3, 200), part("c", 410, 6)]
    first, second, third = extents(parts, {"a": 0, "b": 8, "c": 14})
    assert (first.file_offset, first.length, first.runs) == (0, 10, (Run(0, 10, 0),))
    assert (second.file_offset, second.runs) == (208, (Run(0, 2, 10),))
    assert (third.file_offset, third.runs) == (408, (Run(0, 8, 12),))


def test_parts_without_bytes_are_not_read() -> None:
    parts = [part("a", 0, 0), part("b", 0, 5, 0, 1000), part("c", 0, 0, 3, 1000), part("d", 0, 4)]
    assert extents(parts, dict.fromkeys("abcd", 0)) == [Extent(0, 0, 0, 4, (Run(0, 4, 0),))]
