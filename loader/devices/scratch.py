"""Memory of a GPU that is one process's own, and that lies where it will lie in every other.

What a captured step computes in, and what it is told there, must not move: its kernels know the
addresses. So a worker takes all of it from one range with a fixed base. Nobody else maps this
memory, and it has no descriptor: it is frozen and restored with the process that it belongs to.
"""

from __future__ import annotations

from coldframe.loader.arena import SCRATCH_BASE, round_up
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.vmm import DeviceReservation, quietly
from coldframe.loader.errors import ArenaError, DeviceFull

__all__ = ["Scratch"]

_ROOM = 64 << 30
"""Addresses, which cost nothing."""
_ALIGNED = 512
"""Bytes, as torch's own allocator has it."""
_STEP = 16 << 20
"""Memory is got in steps of this, not to ask the driver for every small piece."""


class Scratch:
    """A range of a GPU's addresses that gets memory from its start on, as pieces of it are taken.

    Pieces lie behind one another. What was given back is free again once nothing is left of what
    was taken behind `fix`: these are pieces of one purpose that go together.

    Args:
        context: The GPU.
        size: Bytes of addresses.
        base: Where; any other place is as good for a process that is alone with it.

    Attributes:
        fixed: Whether it lies at its base, so that what is known of it holds in other processes.

    Raises:
        DeviceError: There are no addresses left.
    """

    def __init__(self, context: Context, size: int = _ROOM, base: int = SCRATCH_BASE) -> None:
        self._context = context
        self._reservation = DeviceReservation(context, size, base)
        self.fixed = self._reservation.address == base
        self._grown = 0
        self._end = 0
        self._kept = 0
        self._live: dict[int, int] = {}

    @property
    def address(self) -> int:
        """Where it begins."""
        return self._reservation.address

    @property
    def size(self) -> int:
        """Bytes that there may be."""
        return self._reservation.size

    @property
    def grown(self) -> int:
        """Bytes that have memory behind them, from the start."""
        return self._grown

    @property
    def used(self) -> int:
        """Bytes that were taken, from the start."""
        return self._end

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """Where it is, as DLPack says it."""
        return self._reservation.dlpack_device

    def take(self, nbytes: int) -> int:
        """The address of a piece of memory; what it holds is anything.

        Raises:
            ArenaError: There are not so many addresses.
            DeviceFull: The GPU has not that much left.
            DeviceError: The driver refuses. In each case all is as it was.
        """
        start = self._end
        end = round_up(start + max(nbytes, 1), _ALIGNED)
        self.reach(end)
        self._end = end
        address = self.address + start
        self._live[address] = nbytes
        return address

    def give_back(self, address: int) -> None:
        """Takes a piece back, whose memory stays here for the next ones."""
        self._live.pop(address, None)
        if not any(place >= self.address + self._kept for place in self._live):
            self._end = self._kept

    def fix(self) -> None:
        """What was taken by now stays for good; only what comes behind it is ever taken anew."""
        self._kept = self._end

    def reach(self, nbytes: int) -> None:
        """Has memory behind the first `nbytes`; see `take`."""
        if nbytes > self.size:
            raise ArenaError(
                "a worker's own memory is at its end",
                where=self._context.name,
                expected=f"at most {self.size:,} bytes",
                got=f"{nbytes:,} bytes",
            )
        if nbytes <= self._grown:
            return
        missing = nbytes - self._grown
        unit = self._context.granularity
        generous = min(round_up(missing, round_up(_STEP, unit)), self.size - self._grown)
        try:
            self._grow(generous)
        except DeviceFull:
            if round_up(missing, unit) == generous:
                raise
            self._grow(round_up(missing, unit))

    def _grow(self, length: int) -> None:
        driver = self._context.driver
        self._context.bind()
        memory = driver.create(self._context.ordinal, length, shareable=False)
        try:
            self._reservation.map(self._grown, length, memory, writable=True)
        finally:
            quietly(driver.release, memory)
        self._grown += length

    def close(self) -> None:
        """Gives memory and addresses back; nothing may use them any more."""
        self._live.clear()
        self._reservation.close()
