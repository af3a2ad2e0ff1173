"""The files of an image and the objects that they are kept in.

An image is a directory of files. In a store they are *objects*, cut in pieces of 2 MiB each of
which is compressed for itself: several threads work at once, and what one of them has in hand
stays in its core's cache and fills one huge page. Each piece's hash is of its bytes *as stored*:
nothing is given to a decompressor that has not been found genuine, and where an image is
compressed there is a fifth of the bytes to hash.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from coldframe.snapshot.fields import Fields

__all__ = ["PIECE_BYTES", "ImageFile", "StoredObject", "check_files", "is_file_name"]

PIECE_BYTES = 2 << 20
"""Of a file, uncompressed: a huge page, and what the second level of a core's cache holds."""

_HASH = re.compile("[0-9a-f]{64}")
_CODEC = re.compile("raw|lz4")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}")
_MAX_PIECE_BYTES = PIECE_BYTES + PIECE_BYTES // 255 + 16
"""What LZ4 makes of bytes that cannot be compressed, at most."""


class StoredObject(NamedTuple):
    """Bytes under one name in a store.

    Attributes:
        digest: SHA-256 of all of it as it is stored, which is its name.
        codec: `raw` or `lz4`.
        size: Its bytes, uncompressed.
        pieces: Of each piece the bytes that it has in the store, and their SHA-256.
    """

    digest: str
    codec: str
    size: int
    pieces: tuple[tuple[int, str], ...]

    @property
    def stored_bytes(self) -> int:
        """Its bytes in the store."""
        return sum(nbytes for nbytes, _ in self.pieces)

    @staticmethod
    def from_json(value: object) -> StoredObject:
        fields = Fields.of(value, "an object of an image")
        digest, codec = fields.text("digest", _HASH), fields.text("codec", _CODEC)
        size = fields.integer("size")
        pieces: list[tuple[int, str]] = []
        for piece in fields.items("pieces"):
            match piece:
                case [int(nbytes), str(found)] if _HASH.fullmatch(found):
                    pieces.append((nbytes, found))
                case _:
                    raise fields.wrong("pieces", "a number of bytes and a hash for each", piece)
        wanted = -(-size // PIECE_BYTES)
        if len(pieces) != wanted:
            raise fields.wrong("pieces", f"{wanted} pieces", f"{len(pieces)}")
        for number, (nbytes, _) in enumerate(pieces):
            plain = min(PIECE_BYTES, size - number * PIECE_BYTES)
            least, most = (plain, plain) if codec == "raw" else (1, _MAX_PIECE_BYTES)
            if type(nbytes) is not int or not least <= nbytes <= most:
                raise fields.wrong(f"pieces[{number}]", f"{least} to {most} bytes", f"{nbytes}")
        fields.end()
        return StoredObject(digest, codec, size, tuple(pieces))

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "pieces": [[*piece] for piece in self.pieces]}


class ImageFile(NamedTuple):
    """A file of an image.

    Attributes:
        name: A plain file name.
        size: Its bytes.
        object_index: The number of the object that it is in.
        offset: Where it begins in that, uncompressed.
    """

    name: str
    size: int
    object_index: int
    offset: int

    @staticmethod
    def from_json(value: object) -> ImageFile:
        fields = Fields.of(value, "a file of an image")
        file = ImageFile(
            fields.text("name", _NAME),
            fields.integer("size"),
            fields.integer("object_index"),
            fields.integer("offset"),
        )
        fields.end()
        return file

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def is_file_name(name: str) -> bool:
    """Whether a file of an image may be called so."""
    return _NAME.fullmatch(name) is not None


def check_files(
    fields: Fields, objects: Sequence[StoredObject], files: Sequence[ImageFile]
) -> None:
    """That each byte of each object is in one file: nothing is left out or written twice.

    Args:
        fields: What they are part of, for the error.
        objects: The objects.
        files: The files.

    Raises:
        SnapshotError: It is not so.
    """
    ends = [0] * len(objects)
    for file in sorted(files, key=lambda file: (file.object_index, file.offset, file.size)):
        if file.object_index >= len(ends) or file.offset != ends[file.object_index]:
            raise fields.wrong("files", "files one behind the other in their objects", file.name)
        ends[file.object_index] += file.size
    for item, end in zip(objects, ends, strict=True):
        if item.size != end:
            raise fields.wrong("files", f"{item.size} bytes in {item.digest}", f"{end} bytes")
    names = [file.name for file in files]
    if names != sorted(set(names)):
        raise fields.wrong("files", "each name once, in order", "another order")
