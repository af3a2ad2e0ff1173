"""What the KV store counts."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, fields

__all__ = ["KvTally", "StoreUsage"]


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """The KV store's numbers.

    Args:
        memory_stored: Blocks that went to host memory, so far.
        memory_loaded: Blocks that came back from there.
        memory_bytes: What is there now.
        disk_stored: Blocks that were written to files.
        disk_loaded: Blocks that were read from files.
        disk_bytes: What all files take, as far as it was looked.
        corrupt: Files that were not what they should be, and were deleted.
        unreadable: Blocks whose files could not be read.
        unwritten: Blocks that had to leave before they were written.
        pauses: How often writing has stopped, because it failed.
        paused: 1 while it does not go on, else 0.
    """

    memory_stored: int = 0
    memory_loaded: int = 0
    memory_bytes: int = 0
    disk_stored: int = 0
    disk_loaded: int = 0
    disk_bytes: int = 0
    corrupt: int = 0
    unreadable: int = 0
    unwritten: int = 0
    pauses: int = 0
    paused: int = 0

    def to_wire(self) -> dict[str, int]:
        """The numbers, named as what they are of."""
        return {f"kv_store_{name}": count for name, count in asdict(self).items()}

    @staticmethod
    def states() -> dict[str, bool]:
        """By name: whether it says how things are now, and not how often something was so."""
        now = ("memory_bytes", "disk_bytes", "paused")
        return {part.name: part.name in now for part in fields(StoreUsage)}

    @staticmethod
    def names() -> list[str]:
        """The names in `to_wire`."""
        return [f"kv_store_{part.name}" for part in fields(StoreUsage)]


class KvTally:
    """Counts, from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys((part.name for part in fields(StoreUsage)), 0)

    def add(self, name: str, count: int = 1) -> None:
        """Counts something by its name in `StoreUsage`."""
        with self._lock:
            self._counts[name] += count

    def set(self, name: str, value: int) -> None:
        """Notes how much there is of something now."""
        with self._lock:
            self._counts[name] = value

    def usage(self) -> StoreUsage:
        with self._lock:
            return StoreUsage(**self._counts)
