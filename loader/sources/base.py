"""Where a checkpoint is, and how its bytes are had: what every kind of place offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from coldframe.loader.checkpoints.checkpoint import Shard

__all__ = ["SEALED", "Origin", "ShardFile", "Source"]

SEALED = "verified by its seal"


class ShardFile(Protocol):
    """One weight file while its header is read.

    Attributes:
        uri: Its path or URI, for people.
        size: Bytes in it.
        version: What changes when its content does: an ETag, or the times of a local file.
    """

    @property
    def uri(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def version(self) -> str: ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly so many bytes of it.

        Raises:
            SourceError: They could not be had.
        """
        ...

    def close(self) -> None: ...


class Origin(Protocol):
    """A place that holds the files of one checkpoint: a directory, a bucket's prefix, a peer."""

    @property
    def uri(self) -> str:
        """The place, for people: no credentials in it."""
        ...

    @property
    def path(self) -> str | None:
        """Where it is as a local directory; None where it is not one."""
        ...

    @property
    def concurrency(self) -> int:
        """How many small reads at once pay off: 1 where they come from a disk."""
        ...

    def check(self) -> None:
        """Makes sure that there may be a checkpoint at all.

        Raises:
            SourceError: There is nothing there, or it may not be read.
            CheckpointError: What is there is no folder.
        """
        ...

    def uri_of(self, name: str) -> str:
        """The path or URI of a file, for people."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file, even one that cannot be read."""
        ...

    def read_small(self, name: str, limit: int) -> bytes:
        """All of a file.

        Raises:
            SourceNotFound: There is none.
            SourceError: It could not be read.
            CheckpointError: It has more bytes than `limit`.
        """
        ...

    def open_shard(self, name: str) -> ShardFile:
        """Opens a weight file for its header.

        Raises:
            SourceError: It is not there or cannot be read.
        """
        ...

    def open_source(self, shards: Sequence[Shard], *, sealed: bool = False) -> Source:
        """The weights of the shards that were read here.

        Args:
            shards: As they were opened.
            sealed: Whether the caller holds all bytes against a seal, so that no weaker check of
                the place's own is wanted.

        Raises:
            SourceError: One of them cannot be opened, or is not the one that was read.
        """
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """Bytes of a checkpoint's shards, addressed by shard and offset. Safe for several threads."""

    @property
    def readers(self) -> int | None:
        """How many threads should read at once; None leaves it to the number of CPUs."""
        ...

    @property
    def chunk(self) -> int | None:
        """How many bytes to ask for at once, a power of two; None leaves it to the stream."""
        ...

    @property
    def note(self) -> str:
        """How the bytes come, for the timeline."""
        ...

    @property
    def verified(self) -> str | None:
        """What vouches for the bytes once all have been read (`finish`), or why nothing does.

        None where nobody has looked.
        """
        ...

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        """Fills the buffers, one after the other, with the shard's bytes from an offset on.

        Raises:
            SourceError: They could not be had, all of them. What is in the buffers is undefined.
        """
        ...

    def finish(self) -> None:
        """Makes sure that all that was read belongs to the checkpoint that was planned.

        Called once everything has been read, before the last stage is given out.

        Raises:
            SourceChanged: A shard was changed, cut or replaced meanwhile.
            SourceCorrupt: Something does not have its checksum.
        """
        ...

    def abort(self) -> None:
        """Makes reads that wait for a network end soon, with an error; from another thread."""
        ...

    def close(self) -> None:
        """Gives everything back. No read goes on any more."""
        ...
