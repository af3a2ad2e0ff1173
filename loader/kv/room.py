"""How much of a GPU's memory KV may take where nobody says: what weights and programs leave.

On a GPU the blocks are mapped as they are needed and nobody else shares the device as a rule, so
that all of the rest may become KV. How much that is only the memory service can tell, once it has
a context: the front never loads a driver.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["KvRoom"]


@dataclass(frozen=True, slots=True)
class KvRoom:
    """A rule for the size of the KV.

    Args:
        share: Of the device's memory, what all of us may take together. The rest is for the
            largest tensors of a prefill, for what fragments, and for those who come later.
        reserve: Bytes of it for contexts and workspaces of processes that are not up yet; at most
            a quarter of the device.
        part: Of the device's memory, what KV may take at most.
        others: Bytes of the device that another engine takes for KV of its own.
        split: So many engines have as much KV each.
    """

    share: float = 0.9
    reserve: int = 0
    part: float = 1.0
    others: int = 0
    split: int = 1

    def nbytes(self, total: int, free: int, coming: int) -> int:
        """How much KV there may be, which may be none at all.

        Args:
            total: The device's memory, in bytes.
            free: What of it nobody has at the moment.
            coming: Bytes of weights that are to come still.
        """
        kept = round((1.0 - self.share) * total) + min(self.reserve, total // 4)
        room = min(round(self.part * total), free - coming - kept - self.others)
        return max(0, room // self.split)

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_wire(data: dict[str, Any]) -> KvRoom:
        return KvRoom(**data)
