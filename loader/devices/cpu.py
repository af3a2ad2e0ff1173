"""The CPU as a device: weights and KV in shared memory of the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coldframe.loader.arena import Reservation
from coldframe.loader.cgroup import memory_available
from coldframe.loader.checkpoints.extents import Extent
from coldframe.loader.devices.base import Arena, Arrived, DeviceReport
from coldframe.loader.devices.host_arena import HostArena
from coldframe.loader.devices.parked import StayingWeights, Stretch
from coldframe.loader.errors import DeviceFull
from coldframe.loader.loads.placing import Placer
from coldframe.loader.sources.base import Source

__all__ = ["CpuDevice", "HostLanding"]


class CpuDevice:
    """The host's memory. It is up as soon as it is asked for, and closing it does nothing."""

    name = "cpu"
    layout = None

    def start(self, done: Callable[[], None] = lambda: None) -> bool:
        return True

    def available(self) -> int:
        return memory_available()

    def report(self) -> DeviceReport:
        left = self.available()
        return DeviceReport(self.name, left, left)

    def arena(self, purpose: str, nbytes: int, base: int | None = None, *, now: bool) -> HostArena:
        left = self.available()
        # Shared memory that is not there kills whoever touches it, so ask before.
        if nbytes > left:
            raise DeviceFull(
                f"not enough memory for the {purpose}",
                where=self.name,
                expected=f"{nbytes:,} bytes",
                got=f"{left:,} bytes available",
                hint="Raise the container's memory limit or take a smaller model.",
            )
        return HostArena(self.name, purpose, nbytes, base, now=now)

    def mapping(self, size: int, base: int | None = None, *, exact: bool = False) -> Reservation:
        return Reservation(size, base, exact=exact)

    def land(
        self,
        source: Source,
        nbytes: int,
        base: int,
        *,
        readers: int,
        chunk: int,
        ready: Callable[[Arena], None],
    ) -> HostLanding:
        arena = self.arena("weights", nbytes, base, now=True)
        ready(arena)
        return HostLanding(Placer(source, arena.view(), arena.fault_in))

    def parked(self, arena: Arena | None, stages: Sequence[Sequence[Stretch]]) -> StayingWeights:
        return StayingWeights(len(stages))

    def close(self) -> None:
        pass


class HostLanding:
    """Bytes are read straight to where they belong, and are there when they have been read.

    Args:
        placer: Over the arena's bytes.
    """

    note = ""

    def __init__(self, placer: Placer) -> None:
        self._placer = placer

    def fetch(self, extent: Extent, start: int, stop: int, arrived: Arrived) -> None:
        self._placer.fetch(extent, start, stop)
        arrived(None)

    def cancel(self) -> None:
        """Nothing is under way behind a `fetch`; whoever is in one is waited for by the stream."""

    def close(self) -> None:
        pass
