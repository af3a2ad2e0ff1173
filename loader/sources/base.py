"""What the stream asks of a source of weights."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Source"]


class Source(Protocol):
    """Bytes of a checkpoint's shards, addressed by shard and offset. Safe for several threads."""

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        """Fills the buffer with the shard's bytes from an offset on.

        Raises:
            SourceError: They could not be had, all of them. What is in the buffer is undefined.
        """
        ...

    def make_resident(self, shard: int, offset: int, length: int) -> None:
        """Brings bytes of a shard that is mapped in place into the page cache.

        Raises:
            SourceError: They could not be had.
        """
        ...

    def check_unchanged(self) -> None:
        """Makes sure that all that was read belongs to the checkpoint that was planned.

        Raises:
            SourceChanged: A shard was changed, cut or replaced meanwhile.
        """
        ...

    def close(self) -> None: ...
