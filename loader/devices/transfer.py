"""A reader's side of the ring: buffers taken, filled, and handed in to be copied."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from coldframe.loader.devices.base import Arrived
from coldframe.loader.devices.buffers import Buffer
from coldframe.loader.devices.copies import Copy
from coldframe.loader.errors import DeviceError, ReplicaError

if TYPE_CHECKING:
    from coldframe.loader.devices.ring import Ring

__all__ = ["Job", "Slot", "Transfer"]


class Job:
    """A buffer that was handed in."""

    __slots__ = ("arrived", "buffer", "copies", "transfer")

    def __init__(
        self, buffer: Buffer, copies: Sequence[Copy], arrived: Arrived, transfer: Transfer
    ) -> None:
        self.buffer = buffer
        self.copies = copies
        self.arrived = arrived
        self.transfer = transfer


class Transfer:
    """What one load has in a ring; several loads may share one.

    Attributes:
        base: The device's address that copies count from; to be set before the ring is connected.
        cancelled: Whether `cancel` was called.
        open: Slots that are taken, or whose chunk nobody was told of yet. The ring's to count.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self.base = 0
        self.cancelled = False
        self.open = 0

    def slot(self) -> Slot:
        """A buffer to read into; waits until there is one.

        Use it with `with`: what is not handed in at the end is given back.

        Raises:
            ColdframeError: The transfer was cancelled or the ring has ended; also while it waits.
        """
        return Slot(self._ring, self, self._ring.take(self))

    def check(self) -> None:
        """Raises where nothing more will arrive."""
        if self.cancelled:
            raise ReplicaError("the copies to the device are cancelled")
        if self._ring.error is not None:
            raise self._ring.error

    def cancel(self) -> None:
        """Ends it: nobody is told of anything any more.

        Returns when no buffer of it is read into or copied from. Readers have to leave their slots
        for that; who waits for one gets an error.
        """
        self._ring.cancel(self)


class Slot:
    """A buffer in the hands of a reader, of one thread.

    Attributes:
        view: Its bytes, page-aligned. Not to be touched once it is handed in.
    """

    def __init__(self, ring: Ring, transfer: Transfer, buffer: Buffer) -> None:
        self._ring = ring
        self._transfer = transfer
        self._buffer: Buffer | None = buffer
        self.view = buffer.view

    def submit(self, copies: Sequence[Copy], arrived: Arrived) -> None:
        """Hands it in, to be copied.

        Args:
            copies: What goes where; may be none.
            arrived: Told when all of them are in the device's memory, by a thread of the ring's,
                one chunk after the other. It may take slots of no transfer, nor cancel one.

        Raises:
            DeviceError: A copy reaches beyond the buffer.
            ColdframeError: See `Transfer.slot`; then nobody is told.
        """
        buffer = self._buffer
        assert buffer is not None, "handed in already"
        for copy in copies:
            if copy.offset < 0 or copy.end > len(self.view):
                raise DeviceError(
                    "a copy reaches beyond its buffer",
                    where=f"offset {copy.offset} to {copy.end}",
                    expected=f"at most {len(self.view)} bytes",
                    hint="This is a mistake in coldframe: report it.",
                )
        self._buffer = None
        self._ring.hand_in(Job(buffer, copies, arrived, self._transfer))

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._buffer is not None:
            self._ring.take_back(self._buffer, self._transfer)
            self._buffer = None
