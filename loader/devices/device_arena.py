"""An arena in a GPU's memory that grows where it lies: weights in one step, KV in many.

KV is reserved in full and gets memory as requests come, so that no start waits for it. Blocks are
outermost, so that a step holds whole blocks of all layers, and is one piece of memory to map.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from coldframe.loader.arena import Segment, round_up
from coldframe.loader.devices.base import Mapping, Stretches
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Stream
from coldframe.loader.devices.vmm import DeviceReservation, quietly
from coldframe.loader.errors import ArenaError

__all__ = ["DeviceArena"]


class DeviceArena:
    """An arena whose memory is this process's: reserved in full, given memory step by step.

    Args:
        context: The device.
        size: Bytes that it may grow to; rounded up to the device's granularity.
        base: See `DeviceReservation`.
        exact: See there.
        writable: Whether those who attach its segments may write (KV) or only read (weights).
        zeroed: Whether new memory is filled with zeros. A driver does not promise that.

    Attributes:
        segments: What others map, one for each step. Those who are to have all of it need each new
            one. The descriptors are the arena's.

    Raises:
        ArenaError: The address is taken.
        DeviceError: There are no addresses left.
    """

    lingers_s = 0.5
    """A process's sockets may end before the driver has stopped what it had queued."""

    def __init__(
        self,
        context: Context,
        size: int,
        base: int | None = None,
        *,
        exact: bool = False,
        writable: bool,
        zeroed: bool = False,
    ) -> None:
        self.context = context
        self.segments: list[Segment] = []
        self._writable = writable
        self._zeroed = zeroed
        self._reservation = DeviceReservation(context, size, base, exact=exact)
        self._free = threading.Condition()
        self._looking = 0
        """How many threads `read` or `write`."""

    @property
    def address(self) -> int:
        """Where it begins."""
        return self._reservation.address

    @property
    def size(self) -> int:
        """Bytes that it may grow to."""
        return self._reservation.size

    @property
    def grown(self) -> int:
        """Bytes that have memory behind them, from the start."""
        if not self.segments:
            return 0
        return self.segments[-1].offset + self.segments[-1].length

    def grow(self, nbytes: int) -> Segment:
        """Adds memory behind what is there.

        Args:
            nbytes: At least how much; rounded up to the granularity, but not beyond the arena.

        Returns:
            The new segment, which is also the last of `segments`.

        Raises:
            ArenaError: It has its full size already.
            DeviceFull: The device has not that much left.
            DeviceError: The driver refuses. In each case the arena is as it was.
        """
        offset = self.grown
        left = self.size - offset
        if nbytes < 1 or left == 0:
            raise ArenaError(
                "the arena cannot grow",
                where=self.context.name,
                expected=f"1 to {left:,} bytes",
                got=f"{nbytes:,} bytes",
            )
        length = min(round_up(nbytes, self.context.granularity), left)
        driver = self.context.driver
        self.context.bind()
        memory = driver.create(self.context.ordinal, length)
        try:
            fd = driver.export(memory)
            try:
                self._reservation.map(offset, length, memory, writable=True)
                if self._zeroed:
                    self._zero(offset, length)
            except BaseException:
                os.close(fd)
                raise
        finally:
            quietly(driver.release, memory)
        segment = Segment(fd, 0, length, offset, self._writable)
        self.segments.append(segment)
        return segment

    def _zero(self, offset: int, length: int) -> None:
        try:
            with self._stream() as stream:
                self.context.driver.fill_zeros(self.address + offset, length, stream)
        except BaseException:
            quietly(self._reservation.detach, offset)
            raise

    def shrink(self, nbytes: int = 0) -> list[Segment]:
        """Gives memory back from the end, and keeps the addresses, for `grow`.

        It comes free once those who have it attached have let it go too. No work that touches it
        may be under way, but for `read` and `write`, which are waited for.

        Args:
            nbytes: How much of the arena stays; the step that it ends in does as a whole.

        Returns:
            The segments that are gone; their descriptors are closed.

        Raises:
            DeviceError: It could not be unmapped.
        """
        kept = sum(segment.offset < nbytes for segment in self.segments)
        with self._free:
            gone = self.segments[kept:]
            del self.segments[kept:]
            self._free.wait_for(lambda: not self._looking)
        for segment in gone:
            os.close(segment.fd)
        self._reservation.detach(self.grown)
        return gone

    def discard(self) -> bool:
        self.shrink()
        return True

    def view(self, offset: int, length: int) -> None:
        """The host cannot look at it."""
        return

    def read(self, offset: int, into: memoryview) -> None:
        with self._at(offset, len(into)) as address, self._stream() as stream:
            self.context.driver.copy_out(_address(into), address, len(into), stream)

    def write(self, offset: int, data: memoryview) -> None:
        with self._at(offset, len(data)) as address, self._stream() as stream:
            self.context.driver.copy_in(address, _address(data), len(data), stream)

    def take(self, source: Mapping, stretches: Stretches) -> None:
        driver = self.context.driver
        end = max((to + length for to, _, length in stretches), default=0)
        with self._at(0, end) as address, self._stream() as stream:
            for to, start, length in stretches:
                driver.copy_across(address + to, source.address + start, length, stream)

    @contextmanager
    def _at(self, offset: int, length: int) -> Iterator[int]:
        """The address of bytes that stay where they are for so long."""
        with self._free:
            if offset < 0 or offset + length > self.grown:
                raise ArenaError(
                    "there is no such memory in the arena",
                    where=f"{self.context.name}, offset {offset}, {length} bytes",
                    expected=f"within {self.grown} bytes",
                )
            self._looking += 1
        try:
            yield self.address + offset
        finally:
            with self._free:
                self._looking -= 1
                self._free.notify_all()

    @contextmanager
    def _stream(self) -> Iterator[Stream]:
        """A queue of the calling thread's own; what is put into it is done at the end."""
        driver = self.context.driver
        self.context.bind()
        stream = driver.stream()
        try:
            yield stream
            driver.synchronize(stream)
        finally:
            quietly(driver.destroy_stream, stream)

    def detach(self) -> None:
        """Unmaps all of it here, and keeps memory and addresses; `attach` undoes it."""
        self._reservation.detach()

    def attach(self) -> None:
        """Maps all of it again, where and as it was.

        Raises:
            ArenaError: It is mapped already.
            DeviceError: The driver refuses.
        """
        mine = [Segment(s.fd, 0, s.length, s.offset, True) for s in self.segments]
        self._reservation.attach(mine)

    def close(self) -> None:
        """Gives everything back. The memory lives on while somebody else has it mapped."""
        for segment in self.segments:
            os.close(segment.fd)
        self.segments.clear()
        self._reservation.close()


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if view else 0
