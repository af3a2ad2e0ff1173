"""Where KV is kept that leaves its arena."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DEFAULT_BYTES", "KvStoreOptions"]

DEFAULT_BYTES = 20 << 30
"""What the files may take together where nobody says; 40,000 blocks of a model of 200 MB."""


@dataclass(frozen=True, slots=True)
class KvStoreOptions:
    """Where KV is kept that leaves its arena, and how much of it.

    Args:
        directory: Where on disk; None keeps nothing there.
        max_bytes: What all files in it may take together.
        memory: Bytes of host memory for it.
        kv_format: What the blocks hold; with the model it names the folder.
    """

    directory: str | None = None
    max_bytes: int = DEFAULT_BYTES
    memory: int = 0
    kv_format: str = ""

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_wire(data: dict[str, Any]) -> KvStoreOptions:
        return KvStoreOptions(**data)
