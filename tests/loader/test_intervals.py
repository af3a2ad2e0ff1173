from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.intervals import Intervals

some = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(some, max_size=20), st.lists(some, min_size=1, max_size=10))
def test_it_is_the_set_of_its_offsets(
    added: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    intervals, offsets = Intervals(), set[int]()
    for start, stop in added:
        intervals.add(start, stop)
        offsets |= set(range(start, stop))
    for start, stop in asked:
        assert intervals.covers(start, stop) == (set(range(start, stop)) <= offsets)
    runs = sum(1 for offset in offsets if offset - 1 not in offsets)
    assert len(intervals) == runs


def test_what_touches_is_one() -> None:
    intervals = Intervals()
    for start in (20, 0, 10):
        intervals.add(start, start + 10)
    assert len(intervals) == 1
    assert intervals.covers(0, 30)
    assert not intervals.covers(0, 31)
