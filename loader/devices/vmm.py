"""A GPU's addresses, reserved and mapped: what an arena is there.

The same contract as `arena.Reservation` has on the CPU, and the same `Segment`s on the wire: who
owns memory gives a descriptor of it away, who gets one maps it at the same place. What differs is
that memory comes in pieces of the device's granularity, and that a piece is mapped as a whole.

The driver counts references: memory lives as long as a handle, a mapping or a descriptor of it
does, in any process. So a handle is released as soon as its memory is mapped, and from then on
there is one thing to undo, the mapping, and one to close, the descriptor.

A descriptor gives all rights to its memory: that weights are read-only is up to who maps them. It
keeps a worker from writing there by mistake, and not, as on the CPU, on purpose too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coldframe.loader.arena import Segment, round_up
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Memory
from coldframe.loader.errors import ArenaError, DeviceError, DeviceFull, DeviceLost

__all__ = ["DeviceReservation", "quietly"]


class DeviceReservation:
    """A range of a device's addresses in this process, with the segments mapped into it.

    One thread at a time may use it.

    Args:
        context: The device.
        size: Bytes; rounded up to the device's granularity.
        base: The wanted address, a multiple of the granularity; None leaves it to the driver.
        exact: Whether another address than `base` is an error (see `arena.Reservation`).

    Attributes:
        read_only: Whether what was mapped for reading only cannot be written either. A driver may
            refuse to make that distinction; then such memory is mapped like any other.

    Raises:
        ArenaError: The address is taken.
        DeviceError: There are no addresses left.
    """

    def __init__(
        self, context: Context, size: int, base: int | None = None, *, exact: bool = False
    ) -> None:
        self.context = context
        self.size = round_up(max(size, 1), context.granularity)
        self.read_only = True
        self._mapped: dict[int, int] = {}
        """Length of each mapping, by its offset."""
        driver = context.driver
        context.bind()
        self.address = driver.reserve(self.size, context.granularity, base or 0)
        if exact and base is not None and self.address != base:
            # The driver takes the address as a wish, and another is no error to it.
            quietly(driver.free_addresses, self.address, self.size)
            raise ArenaError(
                "the arena's address is taken in this process",
                where=f"{context.name}, {self.size:,} bytes",
                expected=hex(base),
                got=hex(self.address),
                hint="Start the worker fresh instead of from a snapshot.",
            )

    @property
    def attached(self) -> bool:
        """Whether there is something mapped."""
        return bool(self._mapped)

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """Where this is, as DLPack says it: kDLCUDA, and which GPU."""
        return (2, self.context.ordinal)

    def attach(self, segments: Sequence[Segment]) -> None:
        """Maps memory that another process, or this one, gave a descriptor of.

        The descriptors stay the caller's, who may close them. Where one segment cannot be mapped,
        none of them is.

        Raises:
            ArenaError: A segment does not fit, its place is taken, or its descriptor is not of a
                GPU's memory.
            DeviceLost: The device broke.
        """
        done: list[int] = []
        try:
            for segment in segments:
                self._attach(segment)
                done.append(segment.offset)
        except BaseException:
            for offset in reversed(done):
                quietly(self._unmap, offset)
            raise

    def _attach(self, segment: Segment) -> None:
        where = f"{self.context.name}, offset {segment.offset}, {segment.length} bytes"
        if segment.fd_offset:
            raise ArenaError(
                "memory of a GPU is mapped from its start",
                where=where,
                expected=0,
                got=segment.fd_offset,
            )
        self._check_place(segment.offset, segment.length)
        driver = self.context.driver
        self.context.bind()
        try:
            memory = driver.import_fd(segment.fd)
            try:
                self.map(segment.offset, segment.length, memory, writable=segment.writable)
            finally:
                quietly(driver.release, memory)
        except (DeviceLost, DeviceFull):
            raise
        except DeviceError as error:
            raise ArenaError(
                f"a segment cannot be mapped: {error.what}",
                where=where,
                got=error.got,
                hint="Both sides must be of one version, on GPUs that reach each other's memory.",
            ) from error

    def map(self, offset: int, length: int, memory: Memory, *, writable: bool) -> None:
        """Maps memory at a place, all of it; it may be released then.

        Raises:
            ArenaError: It does not fit, or there is something already.
            DeviceError: The driver refuses.
        """
        self._check_place(offset, length)
        driver, address = self.context.driver, self.address + offset
        driver.map(address, length, memory)
        try:
            self._let_in(address, length, writable)
        except BaseException:
            quietly(driver.unmap, address, length)
            raise
        self._mapped[offset] = length

    def _let_in(self, address: int, length: int, writable: bool) -> None:
        driver, ordinal = self.context.driver, self.context.ordinal
        try:
            driver.set_access(address, length, ordinal, writable=writable)
        except DeviceLost:
            raise
        except DeviceError:
            if writable:
                raise
            driver.set_access(address, length, ordinal, writable=True)
            self.read_only = False

    def _check_place(self, offset: int, length: int) -> None:
        unit, end = self.context.granularity, offset + length
        if offset < 0 or offset % unit or length < 1 or length % unit or end > self.size:
            raise ArenaError(
                "a segment does not fit its arena",
                where=f"{self.context.name}, offset {offset}, {length} bytes",
                expected=f"multiples of {unit} within {self.size} bytes",
            )
        for begin, size in self._mapped.items():
            if begin < end and offset < begin + size:
                raise ArenaError(
                    "there is a segment already",
                    where=f"{self.context.name}, offset {offset}, {length} bytes",
                    got=f"offset {begin}, {size} bytes",
                )

    def detach(self, begin: int = 0) -> None:
        """Unmaps what lies from an offset on, and keeps the addresses, for `attach`.

        A process that holds memory of others cannot be frozen with it, and memory that is to be
        free for others must be mapped nowhere. No work that touches it may be under way.

        Raises:
            DeviceError: Something could not be unmapped; everything else is. It may be tried again.
        """
        first: DeviceError | None = None
        for offset in sorted(self._mapped, reverse=True):
            if offset < begin:
                break
            try:
                self._unmap(offset)
            except DeviceError as error:
                first = first or error
        if first is not None:
            raise first

    def _unmap(self, offset: int) -> None:
        self.context.driver.unmap(self.address + offset, self._mapped[offset])
        del self._mapped[offset]

    def populate(self, offset: int, length: int) -> None:
        """Nothing to be done: a device's memory is mapped as a whole."""

    def close(self) -> None:
        """Unmaps everything and gives the addresses back.

        On a device that is lost nothing can be given back, and nothing needs to be.
        """
        if not self.address:
            return
        try:
            self.detach()
            self.context.driver.free_addresses(self.address, self.size)
        except DeviceLost:
            self._mapped.clear()
        finally:
            self.address = 0


def quietly(step: Callable[..., object], *arguments: object) -> None:
    """Takes a step back where its failure would only hide what led there."""
    try:
        step(*arguments)
    except DeviceError:
        return
