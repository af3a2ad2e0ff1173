"""What the memory service, and those who attach to its arenas, ask of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from coldframe.loader.arena import Segment
from coldframe.loader.checkpoints.extents import Extent
from coldframe.loader.checkpoints.plan import Layout
from coldframe.loader.devices.parked import ParkedWeights, Stretch
from coldframe.loader.errors import ColdframeError
from coldframe.loader.memory import Memory
from coldframe.loader.sources.base import Source

__all__ = [
    "Arena",
    "Arrived",
    "Device",
    "DeviceReport",
    "Landing",
    "Mapping",
    "Stretches",
    "kind_of",
]

Arrived = Callable[[ColdframeError | None], None]
"""Told once of each chunk: nothing where it is in, or the error for which it will not be."""


Stretches = Sequence[tuple[int, int, int]]
"""Where to, where from and how many bytes; the places are offsets in arenas."""


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What a device is.

    Args:
        name: What its maker calls it.
        total: Bytes of its memory.
        free: What of it nobody has at the moment.
    """

    name: str
    total: int
    free: int


class Arena(Memory, Protocol):
    """Memory of a device that is this process's, and that others map.

    Attributes:
        segments: What they map. The descriptors are the arena's.
        lingers_s: For how long work of a process that is gone may still write to it, in seconds.
    """

    segments: list[Segment]
    lingers_s: float

    @property
    def address(self) -> int:
        """Where it begins, for the device."""
        ...

    @property
    def size(self) -> int:
        """Bytes that it may grow to."""
        ...

    @property
    def grown(self) -> int:
        """Bytes that have memory behind them, from the start."""
        ...

    def grow(self, nbytes: int) -> Segment:
        """Adds memory behind what is there; the new segment is the last of `segments`.

        Args:
            nbytes: At least how much, within the arena's size.

        Raises:
            ArenaError: It has its full size already.
            DeviceFull: The device has not that much left.
            DeviceError: The driver refuses. In each case the arena is as it was.
        """
        ...

    def take(self, source: Mapping, stretches: Stretches) -> None:
        """Copies bytes out of another arena, of a device of the same kind; waits until they are in.

        Args:
            source: Where the other arena is attached, on this one's device.
            stretches: What goes where.

        Raises:
            DeviceError: They could not be copied.
        """
        ...

    def discard(self) -> bool:
        """Gives the memory back and keeps the addresses; what was in it is lost.

        Returns:
            Whether that takes segments away. Then those who have them attached must let them go
            for the memory to come free, and `grow` makes new ones; else whoever touches the
            memory again finds zeros.

        Raises:
            DeviceError: It cannot be done.
        """
        ...

    def close(self) -> None:
        """Gives it up. The memory lives on while somebody else has it mapped."""
        ...


class Mapping(Protocol):
    """Addresses of a device in this process, to map others' segments into; see `Arena`."""

    size: int
    address: int

    @property
    def attached(self) -> bool:
        """Whether there is something mapped."""
        ...

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """Where it is, as DLPack says it: the kind of device, and which."""
        ...

    def attach(self, segments: Sequence[Segment]) -> None:
        """Maps segments at their places.

        Raises:
            ArenaError: One does not fit, or cannot be mapped.
            DeviceLost: The device broke.
        """
        ...

    def detach(self) -> None:
        """Lets all of them go and keeps the addresses. Nobody may look at them meanwhile.

        Raises:
            DeviceError: Something could not be unmapped.
        """
        ...

    def populate(self, offset: int, length: int) -> None:
        """Spares whoever touches a stretch first what that would cost."""
        ...

    def close(self) -> None:
        """Unmaps everything and gives the addresses back."""
        ...


class Landing(Protocol):
    """Where a stream's bytes go down: from a source into an arena. For several threads."""

    @property
    def note(self) -> str:
        """How they got there, for the timeline; empty where there is nothing to say."""
        ...

    def fetch(self, extent: Extent, start: int, stop: int, arrived: Arrived) -> None:
        """Brings bytes of an extent to their places.

        Args:
            extent: The extent.
            start: The first byte's offset in the file.
            stop: The offset behind the last.
            arrived: Told when they are there, from this thread or another; not where this raises.

        Raises:
            SourceError: They could not be had.
            DeviceError: The device broke, or there is none.
        """
        ...

    def cancel(self) -> None:
        """Ends it: nobody is told of anything any more, and nothing is written to the arena.

        Returns when that is so. Who is in a `fetch` is waited for.
        """
        ...

    def close(self) -> None:
        """Gives back what only a stream needs. Not to be called from `arrived`."""
        ...


class Device(Protocol):
    """Memory that weights and KV can live in."""

    @property
    def name(self) -> str:
        """As it is named on the command line, such as `cpu` or `cuda:0`."""
        ...

    @property
    def layout(self) -> Layout | None:
        """How weights must lie in it; None where any layout will do.

        Where any will, weight files may also be mapped in place of an arena.
        """
        ...

    def start(self, done: Callable[[], None] = lambda: None) -> bool:
        """Brings it up, beside all else: what uses it before waits for that.

        Args:
            done: Called by another thread when it is up, or cannot be brought up, which shows when
                it is used.

        Returns:
            Whether it is up already; then `done` is not called.
        """
        ...

    def available(self) -> int:
        """Bytes that can still be allocated.

        Raises:
            DeviceError: It cannot be used.
        """
        ...

    def report(self) -> DeviceReport:
        """What the device is; to be asked for once it is up.

        Raises:
            DeviceError: It cannot be used.
        """
        ...

    def arena(self, purpose: str, nbytes: int, base: int | None = None, *, now: bool) -> Arena:
        """An arena of this process.

        Args:
            purpose: What for, `weights` or `kv`; it shows in messages, and in the process's memory
                map.
            nbytes: How large.
            base: The wanted address; None leaves it to the device.
            now: Whether all of it will be filled at once (weights): then the memory must be there,
                others may only read it. Else it is taken as it is touched, or as the arena grows
                (KV), and others write to it.

        Raises:
            DeviceFull: The device has not that much left.
            DeviceError: It cannot be used.
            ArenaError: There is no room for it among the addresses of this process.
        """
        ...

    def mapping(self, size: int, base: int | None = None, *, exact: bool = False) -> Mapping:
        """Addresses for an arena of another process.

        Args:
            size: The arena's.
            base: The wanted address; None leaves it to the device.
            exact: Whether another address than `base` is an error.

        Raises:
            ArenaError: The address is taken.
            DeviceError: The device cannot be used.
        """
        ...

    def land(
        self,
        source: Source,
        nbytes: int,
        base: int,
        *,
        readers: int,
        chunk: int,
        ready: Callable[[Arena], None],
    ) -> Landing:
        """A stream's way into a new arena for weights; comes back before the device is up.

        Args:
            source: Where the bytes come from.
            nbytes: How large the arena is to be.
            base: Its wanted address.
            readers: How many threads will fetch, at most.
            chunk: Bytes that one of them fetches at once, at most.
            ready: Given the arena, the caller's from then on, before anything is in it; from this
                thread or another. Where there will be none, each fetch fails with the reason.

        Raises:
            DeviceError: The device has not that much left, or cannot be used.
            ArenaError: There is no room for it among the addresses of this process.
        """
        ...

    def parked(self, arena: Arena | None, stages: Sequence[Sequence[Stretch]]) -> ParkedWeights:
        """What has weights leave and come back.

        Args:
            arena: Where they are; None where weight files are mapped in place of one.
            stages: The stretches of each stage, in the order of use.
        """
        ...

    def close(self) -> None:
        """Lets the device go; arenas, mappings and landings must be closed."""
        ...


def kind_of(device: Device) -> str:
    """What kind of device it is, `cpu` or `cuda`: one maps the memory of others of its kind."""
    return device.name.partition(":")[0]
