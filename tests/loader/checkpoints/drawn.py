"""Extents as Hypothesis makes them: runs and gaps of any size, rows among them."""

from __future__ import annotations

from hypothesis import strategies as st

from coldframe.loader.checkpoints.plan import Extent, Run


@st.composite
def extents(draw: st.DrawFn) -> Extent:
    runs, offset, arena = [], 0, draw(st.integers(0, 9))
    for _ in range(draw(st.integers(1, 5))):
        offset += draw(st.integers(0, 40))
        length = draw(st.integers(1, 60))
        count = draw(st.sampled_from([1, 1, 2, 7]))
        stride = length + draw(st.integers(0, 30)) if count > 1 else 0
        runs.append(Run(offset, length, arena, count, stride))
        offset += length if count == 1 else (count - 1) * stride + length
        arena += count * length + draw(st.integers(0, 16))
    end = offset + draw(st.integers(0, 20))
    return Extent(0, 0, draw(st.integers(0, 100)), end, tuple(runs))
