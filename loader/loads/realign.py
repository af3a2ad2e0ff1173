"""Weights copied from where one plan has them to where another wants them."""

from __future__ import annotations

from collections.abc import Callable

from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.memory import copy

__all__ = ["move"]

_STEP = 4 << 20


def move(
    old: Plan, source: memoryview, new: Plan, target: memoryview, check: Callable[[], None]
) -> None:
    """Copies each tensor from where one plan has it to where another wants it.

    Args:
        old: Where they are,
        source: in these bytes.
        new: Where they are wanted,
        target: in these.
        check: Called again and again meanwhile: raises to end it early.
    """
    for name, place in new.placements.items():
        begin = old.placements[name].arena_offset
        for at in range(0, place.nbytes, _STEP):
            check()
            count = min(_STEP, place.nbytes - at)
            to = place.arena_offset + at
            copy(target[to : to + count], source[begin + at : begin + at + count])
