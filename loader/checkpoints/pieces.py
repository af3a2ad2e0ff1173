"""Pieces: what is hashed in one go, so that each read of the stream can be checked by itself.

A shard's data is cut at the start of every tensor and at every multiple of 1 MiB of the file's
offset. So no piece belongs to two tensors, whole tensors are whole pieces, and so is a chunk of
the stream. The cuts follow from the header: only the hashes have to be kept.

The hash is XXH3 with 128 bits: it passes memory at tens of gigabytes a second, which is why all
of a load can be checked. A processor without it, SHA-256 at two, would be the slowest link.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from coldframe.loader.errors import PlatformError
from coldframe.loader.packages import add_site_packages

if TYPE_CHECKING:
    from coldframe.loader.checkpoints.checkpoint import Checkpoint

__all__ = [
    "ALGORITHM",
    "DIGEST_BYTES",
    "PIECE_BYTES",
    "PieceHasher",
    "Pieces",
    "cuts_of",
    "cuts_of_shards",
    "digest_of",
    "hash_package",
    "split",
]

ALGORITHM = "xxh3-128"
DIGEST_BYTES = 16
PIECE_BYTES = 1 << 20


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


def hash_package() -> ModuleType:
    """The package `xxhash`, which lets other threads run while it hashes a piece.

    Raises:
        PlatformError: It is not installed.
    """
    add_site_packages()
    try:
        import xxhash
    except ImportError as error:
        raise PlatformError(
            "weights cannot be checked against their seal without the package xxhash",
            got=error,
            hint="pip install xxhash",
        ) from error
    return xxhash


def cuts_of(data_offset: int, tensors: Iterable[tuple[int, int]]) -> array[int]:
    """Where the pieces of a shard begin, and where the last one ends.

    Args:
        data_offset: Where the data begins in the file.
        tensors: Offset in the file and size in bytes of each tensor, in the order of the file.

    Returns:
        Offsets in the file; piece i goes from the one at i to the one at i + 1.
    """
    cuts, end = array("Q"), data_offset
    for offset, nbytes in tensors:
        if nbytes:
            cuts.append(offset)
            cuts.extend(
                range((offset // PIECE_BYTES + 1) * PIECE_BYTES, offset + nbytes, PIECE_BYTES)
            )
            end = offset + nbytes
    cuts.append(end)
    return cuts


def cuts_of_shards(checkpoint: Checkpoint) -> list[array[int]]:
    """The cuts of each shard of a checkpoint; see `cuts_of`."""
    spans: list[list[tuple[int, int]]] = [[] for _ in checkpoint.shards]
    for tensor in checkpoint.tensors.values():  # in the order of shards and offsets
        spans[tensor.shard].append((tensor.offset, tensor.nbytes))
    return [
        cuts_of(shard.data_offset, found)
        for shard, found in zip(checkpoint.shards, spans, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The pieces of one shard and what they should hash to.

    Attributes:
        cuts: As `cuts_of` has them.
        digests: 16 bytes for each piece.
    """

    cuts: array[int]
    digests: bytes

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def digest(self, piece: int) -> bytes:
        """What a piece should hash to."""
        return self.digests[DIGEST_BYTES * piece : DIGEST_BYTES * (piece + 1)]

    def covering(self, start: int, stop: int) -> range:
        """The pieces that have bytes in a stretch of the file.

        Args:
            start: Where it begins.
            stop: Where it ends; behind `start`.

        Raises:
            ValueError: Some of it lies in the header or behind the end, where there are none.
        """
        if start < self.cuts[0] or stop > self.cuts[-1]:
            raise ValueError(f"bytes {start} to {stop} are not all data of the shard")
        return range(bisect_right(self.cuts, start) - 1, bisect_left(self.cuts, stop))


def split(parts: Sequence[memoryview], cuts: Sequence[int]) -> Iterator[list[memoryview]]:
    """The bytes of each piece, where those of all pieces lie in buffers that may cut them anywhere.

    Args:
        parts: Buffers with the bytes from the first cut to the last, one after the other.
        cuts: Where the pieces begin, and where the last one ends.
    """
    part, at = 0, 0
    for piece in range(len(cuts) - 1):
        found, left = [], cuts[piece + 1] - cuts[piece]
        while left:
            view = parts[part][at : at + left]
            if not view:
                part, at = part + 1, 0
                continue
            found.append(view)
            at += len(view)
            left -= len(view)
        yield found


def digest_of(views: Sequence[memoryview], xxhash: ModuleType) -> bytes:
    """The hash of bytes that lie in several buffers."""
    if len(views) == 1:
        found: bytes = xxhash.xxh3_128_digest(views[0])
        return found
    hasher: _Hash = xxhash.xxh3_128()
    for view in views:
        hasher.update(view)
    return hasher.digest()


class PieceHasher:
    """Hashes the pieces of a shard while it is written front to back.

    Args:
        cuts: As `cuts_of` has them.
    """

    def __init__(self, cuts: array[int]) -> None:
        self._xxhash = hash_package()
        self._cuts = cuts
        self._at = cuts[0]
        self._piece = 0
        self._hash: _Hash = self._xxhash.xxh3_128()
        self.digests = bytearray()
        """16 bytes for each piece that is complete."""

    def update(self, data: memoryview) -> None:
        """Takes the bytes that come next."""
        while data:
            view = data[: self._cuts[self._piece + 1] - self._at]
            self._hash.update(view)
            self._at += len(view)
            data = data[len(view) :]
            if self._at == self._cuts[self._piece + 1]:
                self.digests += self._hash.digest()
                self._hash = self._xxhash.xxh3_128()
                self._piece += 1
