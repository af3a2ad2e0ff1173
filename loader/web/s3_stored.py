"""Which checksums S3 has of an object: one CRC of all of it, or one of each part of its upload."""

from __future__ import annotations

from base64 import b64decode
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from coldframe.loader.errors import ColdframeError

__all__ = ["Block", "Stored", "StoredShard", "ask", "by_block", "why_not_asked"]

_NAMES = {"crc64nvme": "ChecksumCRC64NVME", "crc32c": "ChecksumCRC32C", "crc32": "ChecksumCRC32"}
_MAX_PARTS = 10_000  # as many as S3 lets an object have


class StoredShard(Protocol):
    """What must be known of a shard; `checkpoint.Shard` has it."""

    @property
    def name(self) -> str: ...

    @property
    def uri(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def version(self) -> str: ...

    @property
    def data_offset(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes that have one checksum: an object, or a part of its upload.

    Attributes:
        start: The offset of the first of them.
        end: The offset behind the last.
        checksum: Their CRC.
    """

    start: int
    end: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Stored:
    """The checksums that S3 has of an object.

    Attributes:
        kind: `crc64nvme`, `crc32c` or `crc32`; empty where there is none to use.
        blocks: In order, from the object's start to its end.
        why_not: What stands in the way, where there are no blocks.
    """

    kind: str = ""
    blocks: tuple[Block, ...] = ()
    why_not: str = ""


def by_block(
    blocks: Sequence[Block], offset: int, parts: Sequence[memoryview]
) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Bytes from an offset on, cut where blocks begin: the block's index, the offset, the bytes."""
    number = bisect_right(blocks, offset, key=lambda block: block.start) - 1
    cut: list[memoryview] = []
    start = at = offset
    for part in parts:
        rest = part
        while rest.nbytes:
            taken = rest[: blocks[number].end - at]
            rest = rest[taken.nbytes :]
            cut.append(taken)
            at += taken.nbytes
            if at == blocks[number].end:
                yield number, start, cut
                start, number, cut = at, number + 1, []
    if cut:
        yield number, start, cut


def ask(client: Any, bucket: str, key: str, shard: StoredShard) -> Stored:
    """Asks S3 for the checksums of an object: one request, and one more for 1000 parts.

    Parts are listed only to those who may `s3:GetObjectAttributes`.

    Args:
        client: botocore's.
        bucket: The object's bucket.
        key: Its key.
        shard: What it was when it was opened.

    Raises:
        Exception: Whatever botocore raises; `why_not_asked` puts it into words.
    """
    head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    if (head["ContentLength"], _bare(head["ETag"])) != (shard.size, _bare(shard.version)):
        return Stored(why_not=f"{shard.uri} was replaced meanwhile")
    kind = next((kind for kind, name in _NAMES.items() if name in head), None)
    if kind is None:
        return Stored(why_not=f"S3 has no CRC of {shard.uri}")
    value = head[_NAMES[kind]]
    # Where the type is not named, a dash and the number of parts tell a composite: behind the
    # checksum, or, in some stores, behind the ETag alone.
    parted = "-" in value or "-" in _bare(head["ETag"])
    if head.get("ChecksumType", "COMPOSITE" if parted else "FULL_OBJECT") == "FULL_OBJECT":
        return Stored(kind, (Block(0, shard.size, _number(value)),))
    blocks = _parts(client, bucket, key, shard, _NAMES[kind])
    if not blocks:
        return Stored(why_not=f"S3 does not list the parts of {shard.uri}")
    return Stored(kind, blocks)


def _parts(client: Any, bucket: str, key: str, shard: StoredShard, name: str) -> tuple[Block, ...]:
    """The parts of a multipart upload with their checksums; none where that is not all of it."""
    blocks: list[Block] = []
    at, marker = 0, 0
    while len(blocks) < _MAX_PARTS:
        page = client.get_object_attributes(
            Bucket=bucket,
            Key=key,
            ObjectAttributes=["ETag", "ObjectParts"],
            PartNumberMarker=marker,
        )
        listed = page.get("ObjectParts", {})
        parts = listed.get("Parts", [])
        if _bare(page.get("ETag", "")) != _bare(shard.version) or not parts:
            return ()
        for part in parts:
            if name not in part or part["Size"] <= 0:
                return ()
            blocks.append(Block(at, at + part["Size"], _number(part[name])))
            at += part["Size"]
        if not listed.get("IsTruncated"):
            return tuple(blocks) if at == shard.size else ()
        marker = listed["NextPartNumberMarker"]
    return ()


def why_not_asked(shard: StoredShard, error: Exception) -> str:
    """Why there is no checksum; what other libraries write into their errors is not shown."""
    if isinstance(error, ColdframeError):
        return f"S3 did not tell the checksum of {shard.uri}: {error.what}"
    answer = getattr(error, "response", {})
    reason = answer.get("Error", {}).get("Code") or type(error).__name__
    return f"S3 did not tell the checksum of {shard.uri} ({reason})"


def _bare(etag: str) -> str:
    return etag.strip('"')


def _number(value: str) -> int:
    return int.from_bytes(b64decode(value, validate=True), "big")
