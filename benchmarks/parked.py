"""What weights that leave a GPU for host memory and come back cost, beside a bare copy.

For whoever has a GPU to measure on; there is no command of its own. It needs neither torch nor a
model: the bytes are whatever the arena holds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.locked import PIECE, LockedMemory
from coldframe.loader.devices.parked import Stretch
from coldframe.loader.devices.pinned import PinnedWeights

__all__ = ["ParkingFigures", "measure"]

_BARE = 1 << 30
"""Bytes of one bare copy, at most: what a large copy reaches, and no host can fail to have."""


@dataclass(frozen=True, slots=True)
class ParkingFigures:
    """Seconds of each step, for so many bytes.

    Args:
        nbytes: Of the weights.
        keep_s: Into host memory for the first time: it is found, locked and filled.
        leave_s: The device's memory is given back.
        come_back_s: It is taken again; each of the runs.
        first_s: From then on, until the first stage was in.
        bring_s: And until all of them were; each of the runs.
        bare_s: The same bytes by copies as large as one piece of locked memory allows, one after
            the other and waited for once; each of the runs.
        note: How the host memory was.
    """

    nbytes: int
    keep_s: float
    leave_s: list[float]
    come_back_s: list[float]
    first_s: list[float]
    bring_s: list[float]
    bare_s: list[float]
    note: str

    @property
    def keep_rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.keep_s

    @property
    def rates(self) -> list[float]:
        """Of each return, in bytes per second; without the time to take the memory."""
        return [self.nbytes / seconds for seconds in self.bring_s]

    @property
    def bare_rates(self) -> list[float]:
        """Of each bare copy, in bytes per second."""
        return [self.nbytes / seconds for seconds in self.bare_s]


def measure(
    context: Context,
    nbytes: int,
    *,
    stages: int = 34,
    streams: int = 1,
    piece: int = PIECE,
    runs: int = 5,
) -> ParkingFigures:
    """Measures weights that leave and come back, and bare copies between their returns.

    Takes `nbytes` of the device and of host memory, and another 1 GiB of each for the bare copies.

    Args:
        context: The GPU.
        nbytes: Of the weights.
        stages: Into how many equal ones they are cut.
        streams: Queues that the copies alternate between: 1 or 2.
        piece: See `LockedMemory`.
        runs: How often they come back.

    Raises:
        DeviceError: There is too little memory, here or there, or the device breaks.
    """
    arena = DeviceArena(context, nbytes, writable=False)
    try:
        arena.grow(nbytes)
        weights = PinnedWeights(arena, _equal(nbytes, stages), streams=streams, piece=piece)
        try:
            return _measure(context, arena, weights, nbytes, runs)
        finally:
            weights.close()
    finally:
        arena.close()


def _measure(
    context: Context, arena: DeviceArena, weights: PinnedWeights, nbytes: int, runs: int
) -> ParkingFigures:
    keep_s = _seconds(weights.keep)
    leave_s, come_back_s, first_s, bring_s, bare_s = [], [], [], [], []
    with _Bare(context, min(nbytes, _BARE)) as bare:
        for _ in range(runs):
            leave_s.append(_seconds(weights.leave))
            come_back_s.append(_seconds(weights.come_back))
            first, last = _bring(weights)
            first_s.append(first)
            bring_s.append(last)
            bare_s.append(_seconds(lambda: bare.copy(arena.address, nbytes)))
    return ParkingFigures(
        nbytes, keep_s, leave_s, come_back_s, first_s, bring_s, bare_s, weights.note
    )


def _bring(weights: PinnedWeights) -> tuple[float, float]:
    """Seconds until the first stage was in, and until all were."""
    moments: list[float] = []
    started = time.perf_counter()
    weights.bring(lambda stage: moments.append(time.perf_counter()))
    return moments[0] - started, time.perf_counter() - started


class _Bare:
    """Locked memory in one stretch, and a stream."""

    def __init__(self, context: Context, nbytes: int) -> None:
        self._driver = context.driver
        self._nbytes = nbytes
        context.bind()
        self._memory = LockedMemory(nbytes, nbytes)
        self._memory.prepare(self._driver, 0)
        self._stream = self._driver.stream()

    def copy(self, address: int, nbytes: int) -> None:
        for offset in range(0, nbytes, self._nbytes):
            length = min(self._nbytes, nbytes - offset)
            self._driver.copy_in(address + offset, self._memory.address, length, self._stream)
        self._driver.synchronize(self._stream)

    def __enter__(self) -> _Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self._driver.destroy_stream(self._stream)
        self._memory.close(self._driver)


def _equal(nbytes: int, stages: int) -> list[list[Stretch]]:
    edges = [nbytes * index // stages for index in range(stages + 1)]
    return [[(a, b - a)] for a, b in itertools.pairwise(edges)]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
