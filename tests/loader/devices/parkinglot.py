"""A memory service's loop in small, and workers that attach weights on the emulated device."""

from __future__ import annotations

import ctypes
import os
import queue
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from coldframe.loader.arena import HUGE_PAGE, Segment
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.pinned import PinnedWeights
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ColdframeError, DeviceLost
from coldframe.loader.memory_service.parking import Parking
from tests.loader.devices.emulator import GRANULARITY, Emulator

__all__ = ["CONTENT", "MEMORY", "SIZE", "STAGES", "ParkingLot", "TestWorker"]

PATIENCE_S = 60.0
SIZE = 2 * GRANULARITY
MEMORY = 4 * GRANULARITY
CONTENT = random.Random(11).randbytes(SIZE)
STAGES = [[(0, 1000)], [(1024, 3 << 20)], [((3 << 20) + 4096, 5000)]]


@dataclass(eq=False)
class TestWorker:
    """A worker, that handles what it is told when the test lets it.

    Attributes:
        inbox: What it was told and has not handled yet: `detach`, `attach`, or a stage.
        ready: The stages that it may compute with.
    """

    __test__ = False

    view: DeviceReservation
    inbox: deque[str | int | Segment] = field(default_factory=deque)
    ready: set[int] = field(default_factory=set)
    attached: bool = False

    def handle(self) -> bool:
        """Handles one message. Whether that is to be answered: it has let go."""
        message = self.inbox.popleft()
        if isinstance(message, Segment):
            assert not self.attached
            self.view.attach([message])
            os.close(message.fd)
            self.attached = True
        elif message == "detach":
            assert self.attached
            self.ready.clear()
            self.view.detach()
            self.attached = False
            return True
        else:
            assert self.attached
            assert isinstance(message, int)
            assert message not in self.ready
            self.ready.add(message)
        return False

    def check(self) -> None:
        """What it may compute with is right."""
        for stage in self.ready:
            for offset, length in STAGES[stage]:
                here = ctypes.string_at(self.view.address + offset, length)
                assert here == CONTENT[offset : offset + length]

    def die(self) -> None:
        """Its mappings go, and so do descriptors that were on their way to it."""
        for message in self.inbox:
            if isinstance(message, Segment):
                os.close(message.fd)
        self.inbox.clear()
        self.ready.clear()
        self.view.close()


class ParkingLot:
    """What a memory service does for `Parking`, without sockets.

    Attributes:
        told: What the owner was told, and in which order.
        stages: Those that workers were told.
    """

    def __init__(self, emulator: Emulator, *, available: Callable[[], int] | None = None) -> None:
        self.emulator = emulator
        self.gpu = Context(Driver.open(emulator), 0)
        self.arena = DeviceArena(self.gpu, SIZE, writable=False)
        self.arena.grow(SIZE)
        ctypes.memmove(self.arena.address, CONTENT, SIZE)
        self.weights = PinnedWeights(
            self.arena, STAGES, piece=HUGE_PAGE, available=available or (lambda: 64 << 30)
        )
        self.workers: list[TestWorker] = []
        self.told: list[tuple[str, ColdframeError | None]] = []
        self.stages: list[int] = []
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.parking: Parking[TestWorker] = Parking(
            self.weights, len(STAGES), self, self.posted.put
        )

    # -- for the parking -------------------------------------------------------------------------

    def detach(self, worker: TestWorker) -> None:
        worker.inbox.append("detach")

    def attach(self, worker: TestWorker) -> None:
        (segment,) = self.weights.segments
        # As a descriptor that travels: it holds the memory until it is received or lost.
        worker.inbox.append(Segment(os.dup(segment.fd), 0, segment.length, 0, False))

    def stage(self, worker: TestWorker, stage: int) -> None:
        self.stages.append(stage)
        worker.inbox.append(stage)

    def parked(self, error: ColdframeError | None) -> None:
        if error is None:
            assert self.parking.away
        self.told.append(("parked", error))

    def woken(self, error: ColdframeError | None) -> None:
        if error is None:
            assert self.parking.ready == list(range(len(STAGES)))
        self.told.append(("woken", error))

    def lost(self, error: DeviceLost) -> None:
        self.told.append(("lost", error))

    # -- for the test ----------------------------------------------------------------------------

    def hire(self) -> TestWorker:
        """A worker that has come."""
        worker = TestWorker(DeviceReservation(self.gpu, SIZE))
        self.workers.append(worker)
        if self.parking.came(worker):
            self.attach(worker)
            for stage in self.parking.ready:
                self.stage(worker, stage)
        return worker

    def let_handle(self, worker: TestWorker) -> None:
        """Has a worker handle what it was told first."""
        if worker.inbox and worker.handle():
            self.parking.detached(worker)

    def bury(self, worker: TestWorker) -> None:
        """A worker dies."""
        self.workers.remove(worker)
        worker.die()
        self.parking.gone(worker)

    def turn(self, *, wait: bool = False) -> bool:
        """Does what was posted. Whether there was something."""
        done = False
        while True:
            try:
                action = self.posted.get(wait and not done, PATIENCE_S)
            except queue.Empty:
                assert not (wait and not done), "nothing happens"
                return done
            action()
            done = True

    def settle(self) -> None:
        """Has everything happen that can, the workers' part too."""
        self.emulator.go.set()
        busy = True
        while busy:
            busy = self.turn(wait=self.parking._job is not None)
            for worker in list(self.workers):
                while worker.inbox:
                    self.let_handle(worker)
                    busy = True

    @property
    def last(self) -> str:
        """What the owner was told last."""
        what, error = self.told[-1]
        return what if error is None else f"not {what}: {error}"

    def close(self) -> None:
        """Ends all; nothing is left, but of a device that is lost."""
        self.emulator.go.set()
        self.parking.close()
        self.weights.close()
        self.turn()
        for worker in self.workers:
            worker.die()
        self.arena.close()
        if not self.emulator.is_lost:
            self.gpu.close()
