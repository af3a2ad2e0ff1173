"""What parking asks of a device: where weights stay while its memory is others'.

On the CPU they stay where they are. On a GPU they stay in locked host memory (`pinned`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from coldframe.loader.arena import Segment
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.memory import Memory, copy

__all__ = ["Check", "ParkableMemory", "ParkedWeights", "StayingWeights", "Stretch", "stretches_of"]

Check = Callable[[], None]
"""Called again and again while something takes long: raises to end it early."""

Stretch = tuple[int, int]
"""Offset and length of bytes of an arena."""

_GAP = 64 << 10
"""Bytes that are cheaper to copy than to skip."""


class ParkedWeights(Protocol):
    """The weights of one arena, that can leave a device and come back to the same addresses.

    Weights do not change. So what was kept once is kept, also after they have come back: they
    leave for the second time at once.

    One thread at a time may call it; each method may take long.
    """

    @property
    def leaves(self) -> bool:
        """Whether the device's memory comes free; if not, nobody has to let go of anything."""
        ...

    @property
    def kept(self) -> bool:
        """Whether all bytes are where they are to stay."""
        ...

    @property
    def note(self) -> str:
        """How they are kept, for the timeline."""
        ...

    def keep(self, check: Check) -> None:
        """Brings the bytes to where they stay. Who has them attached may go on reading them.

        Raises:
            DeviceFull: There is no room for them there.
            DeviceError: They could not be copied. In each case the device has them as before.
        """
        ...

    def leave(self) -> None:
        """Gives the device's memory back. It comes free once nobody has it attached any more.

        Raises:
            ArenaError: They are not kept.
            DeviceError: It cannot be given back; they are kept all the same.
        """
        ...

    def come_back(self) -> None:
        """Takes memory of the device again, at the same addresses; the bytes are not there yet.

        Raises:
            DeviceFull: Others have it now. It may be tried again.
            DeviceError: The driver refuses.
        """
        ...

    @property
    def segments(self) -> list[Segment]:
        """What others map, while they have not left."""
        ...

    def bring(self, arrived: Callable[[int], None], check: Check) -> None:
        """Brings the bytes back, in the order of use.

        Args:
            arrived: Told each stage whose bytes are in, in their order.
            check: See `Check`.

        Raises:
            DeviceError: They could not be copied; they are kept all the same.
        """
        ...

    def view(self, offset: int, length: int) -> memoryview | None:
        """The very bytes that are kept, once they are; None where they are the arena's own."""
        ...

    def close(self) -> None:
        """Gives back what they were kept in. The arena is its owner's."""
        ...


class StayingWeights:
    """Weights that are where they stay: in host memory, on the CPU.

    Args:
        stages: How many there are.
    """

    leaves = False
    kept = True
    note = "in memory, as they were"

    def __init__(self, stages: int) -> None:
        self.segments: list[Segment] = []  # nobody needs new ones
        self._stages = stages

    def keep(self, check: Check) -> None:
        """Nothing is to be done."""

    def leave(self) -> None:
        """Nothing is to be done."""

    def come_back(self) -> None:
        """Nothing is to be done."""

    def bring(self, arrived: Callable[[int], None], check: Check) -> None:
        """All stages are there."""
        for stage in range(self._stages):
            arrived(stage)

    def view(self, offset: int, length: int) -> None:
        """They are the arena's own."""

    def close(self) -> None:
        """Nothing is to be done."""


class ParkableMemory:
    """The bytes of weights, for this process, wherever they are at the moment.

    Args:
        arena: Where they are while they have not left.

    Attributes:
        weights: What has them leave; None before that was ever asked for.
    """

    def __init__(self, arena: Memory) -> None:
        self.weights: ParkedWeights | None = None
        self._arena = arena

    def view(self, offset: int, length: int) -> memoryview | None:
        """See `Memory.view`. What is kept is looked at, which is faster than to copy it."""
        kept = None
        if self.weights is not None and self.weights.kept:
            kept = self.weights.view(offset, length)
        return kept or self._arena.view(offset, length)

    def read(self, offset: int, into: memoryview) -> None:
        """See `Memory.read`."""
        view = self.view(offset, len(into))
        if view is None:
            self._arena.read(offset, into)
        else:
            copy(into, view)

    def write(self, offset: int, data: memoryview) -> None:
        """See `Memory.write`."""
        self._arena.write(offset, data)


def stretches_of(plan: Plan) -> list[list[Stretch]]:
    """What of an arena each stage fills, in the order of use: few and long stretches.

    What lies in a small gap between two tensors is copied along; it is another stage's, or
    nobody's.
    """
    stages: list[list[Stretch]] = [[] for _ in plan.stages]
    for placement in sorted(plan.placements.values(), key=lambda p: p.arena_offset):
        _add(stages[placement.stage], placement.arena_offset, placement.nbytes)
    return stages


def _add(stretches: list[Stretch], offset: int, length: int) -> None:
    if not length:
        return
    if stretches:
        begin, before = stretches[-1]
        if offset - (begin + before) <= _GAP:
            stretches[-1] = (begin, max(before, offset + length - begin))
            return
    stretches.append((offset, length))
