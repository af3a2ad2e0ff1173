"""KV blocks in host memory: those that have left the arena, the least recently used ones dropped.

Some are on their way to the disk and would be lost without this: they *must* stay, as long as
there is room. All others are kept as far as the memory goes that was given for it; what is there
beyond that is for those on their way alone.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict

from coldframe.loader.errors import DeviceError
from coldframe.loader.memory import copy

__all__ = ["KvMemory"]

_LAZY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which mmap does not name


class KvMemory:
    """Slots for blocks, and which block is in which.

    Not safe for several threads.

    Args:
        block_bytes: Of one block.
        kept: How many blocks are kept for their own sake.
        passing: How many more there may be that must stay.

    Raises:
        DeviceError: There is no room for that.
    """

    def __init__(self, block_bytes: int, kept: int, passing: int) -> None:
        self._block_bytes = block_bytes
        self._kept = kept
        self._slots: OrderedDict[str, int] = OrderedDict()
        """By key, the one used longest ago first."""
        self._must: set[str] = set()
        self._free: list[int] = []
        self._next = 0
        self._most = kept + passing
        size = max(1, self._most * block_bytes)
        try:
            # Taken as slots are written; slots given back are the first to be used again.
            self._memory = memoryview(mmap.mmap(-1, size, flags=_LAZY))
        except OSError as error:
            raise DeviceError(
                "there is no room for KV in host memory",
                where="--kv-store-memory",
                expected=f"{size:,} bytes",
                got=error.strerror,
            ) from error

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    @property
    def nbytes(self) -> int:
        return len(self._slots) * self._block_bytes

    def put(self, key: str, block: memoryview, *, must: bool) -> bool:
        """Keeps a copy of a block.

        Args:
            key: The block's.
            block: Its bytes.
            must: Whether it is on its way to the disk; then call `release` once it is there.

        Returns:
            Whether there is one now. Where not, all room is taken by what must stay.
        """
        if key not in self._slots:
            slot = self._slot(must)
            if slot is None:
                return False
            copy(self._view(slot), block)
            self._slots[key] = slot
        self._slots.move_to_end(key)
        if must:
            self._must.add(key)
        return True

    def read(self, key: str, into: memoryview) -> bool:
        """Copies a block to where it is wanted. Whether it is here."""
        slot = self._slots.get(key)
        if slot is None:
            return False
        copy(into, self._view(slot))
        return True

    def touch(self, key: str) -> None:
        """A block has been used, if it is here."""
        if key in self._slots:
            self._slots.move_to_end(key)

    def release(self, key: str) -> None:
        """A block need not stay any more."""
        if key in self._must:
            self._must.remove(key)
            if len(self._slots) > self._kept:
                self._drop_oldest()

    def _slot(self, must: bool) -> int | None:
        room = self._most if must else self._kept
        if len(self._slots) >= room and not self._drop_oldest():
            return None
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def _drop_oldest(self) -> bool:
        """Drops a block that need not stay. Whether there was one."""
        for key in self._slots:
            if key not in self._must:
                self._free.append(self._slots.pop(key))
                return True
        return False

    def _view(self, slot: int) -> memoryview:
        return self._memory[slot * self._block_bytes : (slot + 1) * self._block_bytes]
