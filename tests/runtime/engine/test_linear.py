"""Linear maps as one: joined exactly where memory allows, and the same answer either way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from coldframe.runtime.engine.linear import Projections, joined

ROWS, HIDDEN = (6, 2, 4), 16
Memory = Callable[..., list[Tensor]]


def laid(*shapes: tuple[int, ...], gaps: tuple[int, ...] = (), start: int = 0) -> list[Tensor]:
    """Random float32 tensors in one piece of memory, `gaps[i]` values before the i-th."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    memory = torch.randn(start + sum(gaps) + sum(sizes), generator=torch.Generator().manual_seed(3))
    parts, end = [], start
    for index, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        end += gaps[index] if gaps else 0
        parts.append(memory[end : end + size].view(shape))
        end += size
    return parts


def matrices(**how: int | tuple[int, ...]) -> list[Tensor]:
    return laid(*[(rows, HIDDEN) for rows in ROWS], **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0, 3])
def test_neighbours_are_one_view_and_no_copy(start: int) -> None:
    parts = matrices(start=start)
    view = joined(parts)
    assert view is not None
    assert view.shape == (12, HIDDEN)
    assert view.is_contiguous()
    assert view.data_ptr() == parts[0].data_ptr()
    assert torch.equal(view, torch.cat(parts))
    parts[2].fill_(7.0)
    assert (view[8:] == 7.0).all()
    assert not (view[:8] == 7.0).any()


def test_vectors_join_too() -> None:
    parts = laid((6,), (1,), (4,))
    view = joined(parts)
    assert view is not None
    assert torch.equal(view, torch.cat(parts))
    assert view.data_ptr() == parts[0].data_ptr()


def two_storages() -> list[Tensor]:
    """Neighbours in memory that torch holds as two."""
    memory = bytearray(4 * 8 * HIDDEN)
    halves = [
        torch.frombuffer(memory, dtype=torch.float32, count=4 * HIDDEN, offset=o)
        for o in (0, 16 * HIDDEN)
    ]
    assert halves[0].data_ptr() + halves[0].nbytes == halves[1].data_ptr()
    return [half.view(4, HIDDEN) for half in halves]


APART: dict[str, Callable[[], list[Tensor]]] = {
    "padding between the first two": lambda: matrices(gaps=(0, 1, 0)),
    "padding between the last two": lambda: matrices(gaps=(0, 0, HIDDEN)),
    "another order": lambda: matrices()[::-1],
    "the same one twice": lambda: [matrices()[0]] * 2,
    "rows of two lengths": lambda: laid((6, HIDDEN), (4, HIDDEN // 2)),
    "two dtypes": lambda: (lambda a, b: [a, b.view(torch.int32)])(*laid((6, 4), (6, 4))),
    "not contiguous": lambda: list(torch.randn(6, 2 * HIDDEN).split(HIDDEN, 1)),
    "memory of their own": lambda: [torch.randn(rows, HIDDEN) for rows in ROWS],
    "two storages over one memory": two_storages,
}


@pytest.mark.parametrize("how", APART)
def test_what_is_not_adjacent_is_not_joined(how: str) -> None:
    assert joined(APART[how]()) is None


def test_as_one_or_apart_the_outputs_are_those_of_each_map() -> None:
    x = torch.randn(5, HIDDEN)
    vectors = laid(*[(rows,) for rows in ROWS])
    padded = laid(*[(rows,) for rows in ROWS], gaps=(0, 4, 0))
    cases = [
        (matrices(), [], True),
        (matrices(gaps=(0, 4, 0)), [], False),
        (matrices(), vectors, True),
        (matrices(), padded, False),
        (matrices(gaps=(0, 4, 0)), vectors, False),
    ]
    for weights, biases, fused in cases:
        maps = Projections(weights, biases)
        assert (maps.weight is not None) == fused
        assert (maps.bias is not None) == (fused and bool(biases))
        expected = [
            functional.linear(x, weight, biases[index] if biases else None)
            for index, weight in enumerate(weights)
        ]
        torch.testing.assert_close(list(maps(x)), expected)


def test_one_kernel_runs_where_they_are_joined() -> None:
    x = torch.randn(5, HIDDEN)
    for weights, calls in ((matrices(), 1), (matrices(gaps=(0, 4, 0)), 3)):
        maps = Projections(weights)
        with torch.profiler.profile() as profile:
            maps(x)
        counted = {event.key: event.count for event in profile.key_averages()}
        assert counted["aten::linear"] == calls
