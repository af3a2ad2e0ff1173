"""Bytes from a source to their places in a device's memory, through a ring of host buffers.

What `placing.Placer` does on the CPU, but for two things: bytes are read into a buffer and not to
where they belong, and they are there some time after `fetch` has come back.
"""

from __future__ import annotations

from coldframe.loader.checkpoints.extents import Extent
from coldframe.loader.devices.base import Arrived
from coldframe.loader.devices.copies import copies_of
from coldframe.loader.devices.transfer import Transfer
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.direct import BLOCK

__all__ = ["DevicePlacer", "buffer_bytes"]


def buffer_bytes(chunk: int) -> int:
    """How large a ring's buffers must be for chunks of so many bytes."""
    return chunk + BLOCK


class DevicePlacer:
    """Fills an arena of a device from a source, for several threads.

    Args:
        source: Where the bytes come from.
        transfer: The load's share of the ring, with the arena's address as its base.
    """

    def __init__(self, source: Source, transfer: Transfer) -> None:
        self._source = source
        self._transfer = transfer

    def fetch(self, extent: Extent, start: int, stop: int, arrived: Arrived) -> None:
        """Reads bytes of an extent, and has them copied to their places.

        Waits while all buffers are in use.

        Args:
            extent: The extent.
            start: The first byte's offset in the file.
            stop: The offset behind the last; see `buffer_bytes`.
            arrived: Told when they are there, or why they will not be; not where this raises.

        Raises:
            SourceError: They could not be had.
            DeviceError: The device broke.
            ReplicaError: The transfer was cancelled.
        """
        # Where address and offset agree modulo a block the disk writes into the buffer by itself.
        lead = start % BLOCK
        with self._transfer.slot() as slot:
            self._source.read_into(extent.shard, start, [slot.view[lead : lead + stop - start]])
            slot.submit(list(copies_of(extent, start, stop, lead)), arrived)
