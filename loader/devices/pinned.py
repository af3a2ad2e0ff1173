"""Weights parked in locked host memory, that come back into a GPU's at the full rate of the link.

    keep        arena -> host memory    locked piece by piece, copied behind that
    leave       the arena shrinks to nothing, and keeps its addresses
    come_back   it grows again, where it was
    bring       host memory -> arena    stage by stage, straight out of the locked memory

Copies are as large as a piece (`locked.PIECE`), in the order of use, and several are under way
at once: the device never waits for this process, which asks for one copy a millisecond. Each has an
event behind it; who waits sleeps in the driver.

What protects from a torn copy is the order: the device's memory is given back only once the event
of every single copy has passed, and a copy that is not whole is forgotten. Nothing protects what is
kept from a bad write of this process, as nothing does in an arena on the CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from coldframe.loader.arena import Segment
from coldframe.loader.cgroup import memory_available
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Event, Stream
from coldframe.loader.devices.locked import PIECE, LockedMemory
from coldframe.loader.devices.parked import Check, Stretch
from coldframe.loader.errors import ArenaError, DeviceError

__all__ = ["PinnedWeights"]

_AHEAD = 16
"""Copies under way: 20 ms of a fast link, which is longer than this process is ever kept waiting,
and how long it takes to cancel."""


@dataclass(frozen=True, slots=True)
class _Move:
    """One copy, either way.

    Attributes:
        offset: Of its first byte, in the arena and in host memory.
        length: Bytes, within one piece.
        complete: The stages that are in once this is.
    """

    offset: int
    length: int
    complete: tuple[int, ...] = ()


class PinnedWeights:
    """See `ParkedWeights`.

    Args:
        arena: The weights, all of them in.
        stages: The stretches of each, in the order of use (`stretches_of`).
        streams: Queues that the copies alternate between: 1 or 2.
        piece: See `LockedMemory`.
        available: See there.

    Attributes:
        leaves: That the device's memory comes free.
        kept: Whether all bytes are in host memory.
    """

    leaves = True

    def __init__(
        self,
        arena: DeviceArena,
        stages: Sequence[Sequence[Stretch]],
        *,
        streams: int = 1,
        piece: int = PIECE,
        available: Callable[[], int] = memory_available,
    ) -> None:
        self.kept = False
        self._arena = arena
        self._context = arena.context
        self._size = arena.grown
        self._stages = stages
        self._piece = piece
        self._available = available
        self._wanted_streams = streams
        self._streams: list[Stream] = []
        self._events: list[Event] = []
        self._host: LockedMemory | None = None

    @property
    def note(self) -> str:
        """How they are kept, for the timeline."""
        return "not kept" if self._host is None else f"in {self._host.note}"

    @property
    def segments(self) -> list[Segment]:
        """What others map; nothing while they have left."""
        return self._arena.segments

    def view(self, offset: int, length: int) -> memoryview:
        """Bytes that are kept. Nobody may hold them beyond `forget` and `close`.

        Raises:
            ArenaError: They are not kept.
        """
        if not self.kept or self._host is None:
            raise self._not_kept()
        return self._host.view(offset, length)

    def keep(self, check: Check = lambda: None) -> None:
        """See `ParkedWeights.keep`."""
        if self.kept:
            return
        driver = self._context.driver
        self._open()
        host = self._host = self._host or LockedMemory(self._size, self._piece, self._available)

        def copy(move: _Move, stream: Stream) -> None:
            # The piece before is on its way while this one is locked.
            host.prepare(driver, move.offset // self._piece)
            address = self._arena.address + move.offset
            driver.copy_out(host.address + move.offset, address, move.length, stream)

        try:
            self._run(list(_cut([(0, self._size)], self._piece)), copy, lambda move: None, check)
        except BaseException:
            self.forget()
            raise
        self.kept = True

    def leave(self) -> None:
        """See `ParkedWeights.leave`."""
        if not self.kept:
            raise self._not_kept()
        self._context.bind()
        self._arena.shrink()

    def come_back(self) -> None:
        """See `ParkedWeights.come_back`."""
        self._context.bind()
        self._arena.shrink()  # what could not be given back at first
        self._arena.grow(self._size)

    def bring(self, arrived: Callable[[int], None], check: Check = lambda: None) -> None:
        """See `ParkedWeights.bring`."""
        if not self.kept or self._host is None:
            raise self._not_kept()
        host, arena, driver = self._host, self._arena, self._context.driver
        self._open()
        first, moves = _moves(self._stages, self._piece)

        def copy(move: _Move, stream: Stream) -> None:
            source = host.address + move.offset
            driver.copy_in(arena.address + move.offset, source, move.length, stream)

        def landed(move: _Move) -> None:
            for stage in move.complete:
                arrived(stage)

        for stage in first:
            arrived(stage)
        self._run(moves, copy, landed, check)

    def forget(self) -> None:
        """Gives the host memory back; the device must have the weights, or nobody has."""
        self.kept = False
        host, self._host = self._host, None
        if host is not None:
            with suppress(DeviceError):
                self._context.bind()
            host.close(self._context.driver)

    def close(self) -> None:
        """See `ParkedWeights.close`."""
        self.forget()
        driver = self._context.driver
        # On a device that is lost nothing can be given back, and nothing needs to be.
        with suppress(DeviceError):
            for event in self._events:
                driver.destroy_event(event)
            for stream in self._streams:
                driver.destroy_stream(stream)
        self._events, self._streams = [], []

    # -- the copies ------------------------------------------------------------------------------

    def _open(self) -> None:
        """Has the calling thread work with the device, and makes what copies need."""
        self._context.bind()
        driver = self._context.driver
        while len(self._streams) < self._wanted_streams:
            self._streams.append(driver.stream())
        while len(self._events) < _AHEAD:
            self._events.append(driver.event())

    def _run(
        self,
        moves: Sequence[_Move],
        copy: Callable[[_Move, Stream], None],
        landed: Callable[[_Move], None],
        check: Check,
    ) -> None:
        """Does all of it; also where that fails, nothing is under way any more behind it."""
        driver, streams = self._context.driver, self._streams
        flying: deque[tuple[_Move, Event]] = deque()

        def settle() -> None:
            move, event = flying[0]
            driver.wait(event)
            flying.popleft()
            landed(move)

        try:
            for number, move in enumerate(moves):
                check()
                if len(flying) == _AHEAD:
                    settle()
                stream, event = streams[number % len(streams)], self._events[number % _AHEAD]
                copy(move, stream)
                driver.record(event, stream)
                flying.append((move, event))
            while flying:
                check()
                settle()
        except BaseException:
            for stream in streams:
                with suppress(DeviceError):
                    driver.synchronize(stream)
            raise

    def _not_kept(self) -> ArenaError:
        return ArenaError(
            "the weights are not parked",
            where=self._context.name,
            expected=f"{self._size:,} bytes in host memory",
            hint="This is a mistake in coldframe: report it.",
        )


def _moves(stages: Sequence[Sequence[Stretch]], piece: int) -> tuple[list[int], list[_Move]]:
    """The copies that bring all stages.

    Returns:
        The stages that are in before any copy, since they have no bytes; and the copies.
    """
    first: list[int] = []
    moves: list[_Move] = []
    for stage, stretches in enumerate(stages):
        moves += _cut(stretches, piece)
        if moves:
            last = moves[-1]
            moves[-1] = _Move(last.offset, last.length, (*last.complete, stage))
        else:
            first.append(stage)
    return first, moves


def _cut(stretches: Sequence[Stretch], piece: int) -> Iterator[_Move]:
    """Stretches as copies, none of which reaches over two pieces."""
    for offset, length in stretches:
        end = offset + length
        while offset < end:
            stop = min(end, (offset // piece + 1) * piece)
            yield _Move(offset, stop - offset)
            offset = stop
