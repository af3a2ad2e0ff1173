"""Weights held against their seal as they arrive: by whoever reads them, before they are used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.pieces import (
    ALGORITHM,
    PIECE_BYTES,
    digest_of,
    hash_package,
    split,
)
from coldframe.loader.checkpoints.seal import GOOD_COPY, Seal
from coldframe.loader.errors import SourceCorrupt
from coldframe.loader.sources.base import SEALED, Source
from coldframe.loader.strict_json import describe

__all__ = ["VerifiedSource", "check_mapped"]


class VerifiedSource:
    """A source that gives out no byte but those that were sealed.

    What was read is hashed in the thread that read it, while the others read on, and from its
    caches as far as it is still there. A piece that is not what it should be is read once more: a
    bit that flipped on the way is mended so, one that flipped on the disk is not.

    A read that begins or ends inside a piece reads the rest of it, too. The stream's chunks are
    whole pieces; at the edges of a tensor-parallel slice this costs up to 1 MiB on either side.

    Args:
        inner: Where the bytes come from.
        seal: What they should be.
        checkpoint: The checkpoint that `inner` reads.

    Raises:
        CheckpointError: The seal is of another checkpoint.
    """

    def __init__(self, inner: Source, seal: Seal, checkpoint: Checkpoint) -> None:
        self._inner = inner
        self._checkpoint = checkpoint
        self._pieces = seal.pieces_of(checkpoint)
        self._lock = threading.Lock()
        self._beside = threading.local()
        self.verified_bytes = 0
        """Bytes that were given out."""
        self.mended_pieces = 0
        """Pieces that were right only when they were read again."""

    @property
    def readers(self) -> int | None:
        # Two more, since some of them hash while the others have requests before the disk.
        readers = self._inner.readers
        return None if readers is None else readers + 2

    @property
    def chunk(self) -> int | None:
        return self._inner.chunk

    @property
    def note(self) -> str:
        return self._inner.note

    @property
    def verified(self) -> str | None:
        return SEALED

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        """As `Source.read_into`; the buffers must not overlap.

        Raises:
            SourceCorrupt: A piece was wrong twice.
            SourceError: The bytes could not be had.
            PlatformError: The package that hashes is missing.
            ValueError: Some of them are no data: a header was checked when it was opened.
        """
        length = sum(map(len, parts))
        if not length:
            return
        pieces = self._pieces[shard]
        covered = pieces.covering(offset, offset + length)
        cuts = pieces.cuts[covered.start : covered.stop + 1]
        before, behind = offset - cuts[0], cuts[-1] - offset - length
        if before or behind:
            beside = self._rest()
            parts = [beside[0][:before], *parts, beside[1][:behind]]
        self._inner.read_into(shard, cuts[0], parts)
        # Imported by the first who has something to hash, while the others still read.
        xxhash = hash_package()
        for piece, views in zip(covered, split(parts, cuts), strict=True):
            if digest_of(views, xxhash) != pieces.digest(piece):
                self._mend(shard, piece, views)
        with self._lock:
            self.verified_bytes += length

    def _mend(self, shard: int, piece: int, views: list[memoryview]) -> None:
        pieces = self._pieces[shard]
        start, stop = pieces.cuts[piece], pieces.cuts[piece + 1]
        self._inner.read_into(shard, start, views)
        got = digest_of(views, hash_package())
        if got != pieces.digest(piece):
            raise _corrupt(self._checkpoint, shard, start, stop, pieces.digest(piece), got)
        with self._lock:
            self.mended_pieces += 1

    def _rest(self) -> tuple[memoryview, memoryview]:
        """Room of the calling thread for the rest of a piece on either side of a read."""
        rest: tuple[memoryview, memoryview] | None = getattr(self._beside, "rest", None)
        if rest is None:
            rest = self._beside.rest = (
                memoryview(bytearray(PIECE_BYTES)),
                memoryview(bytearray(PIECE_BYTES)),
            )
        return rest

    def finish(self) -> None:
        self._inner.finish()

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()


def check_mapped(
    views: Sequence[memoryview],
    seal: Seal,
    checkpoint: Checkpoint,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Holds files that are mapped in place against their seal, in the order in which they lie.

    Weights that are mapped are in use before they could have been checked, so this goes on behind
    the first token, in a thread of its own.

    Args:
        views: Each shard from its first byte to its last.
        seal: What they should be.
        checkpoint: The checkpoint that is mapped.
        cancelled: Asked before each piece; where it says so, the rest is left out.

    Returns:
        The bytes that were checked; all data of the shards unless it was cancelled.

    Raises:
        SourceCorrupt: A piece is wrong.
        CheckpointError: The seal is of another checkpoint.
        PlatformError: The package that hashes is missing.
    """
    xxhash = hash_package()
    checked = 0
    for shard, (view, pieces) in enumerate(zip(views, seal.pieces_of(checkpoint), strict=True)):
        for piece in range(len(pieces)):
            if cancelled():
                return checked
            start, stop = pieces.cuts[piece], pieces.cuts[piece + 1]
            got = digest_of([view[start:stop]], xxhash)
            if got != pieces.digest(piece):
                raise _corrupt(checkpoint, shard, start, stop, pieces.digest(piece), got)
            checked += stop - start
    return checked


def _corrupt(
    checkpoint: Checkpoint, shard: int, start: int, stop: int, expected: bytes, got: bytes
) -> SourceCorrupt:
    """The error for a piece whose bytes are wrong, which names the tensor that they belong to."""
    file = checkpoint.shards[shard]
    name = next(
        tensor.name
        for tensor in checkpoint.tensors.values()
        if tensor.shard == shard and tensor.offset <= start < tensor.offset + tensor.nbytes
    )
    return SourceCorrupt(
        "weights are not those that were sealed",
        where=f"{file.uri}, bytes {start} to {stop}, tensor {describe(name)}",
        expected=f"{ALGORITHM} {expected.hex()}",
        got=got.hex(),
        hint=GOOD_COPY,
    )
