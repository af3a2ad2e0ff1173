"""What a store needs of the place that it is in: a directory, or a bucket.

In it are `objects/HASH`, named by the SHA-256 of their bytes, and `manifests/ID.json`, which name
them. Objects come first and the manifest last, so that what is listed is whole.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from coldframe.snapshot.image_files import StoredObject
from coldframe.snapshot.manifest import is_image_id
from coldframe.snapshot.packing import Bundle
from coldframe.snapshot.unpacking import Reader

__all__ = [
    "MANIFESTS",
    "MAX_MANIFEST_BYTES",
    "OBJECTS",
    "Backend",
    "Document",
    "LocalReader",
    "Usage",
    "Writer",
    "image_of",
    "is_digest",
    "named_in",
]

OBJECTS = "objects"
MANIFESTS = "manifests"
MAX_MANIFEST_BYTES = 64 << 20

_SUFFIX = ".json"
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_DIGEST_NAME = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Document(NamedTuple):
    """A manifest as it lies in a store.

    Attributes:
        id: The image's id, by the document's name.
        raw: Its bytes, or None where they cannot be read.
        why: Why they cannot.
        used: When the image was last used or made, in seconds since 1970.
    """

    id: str
    raw: bytes | None
    why: str
    used: float


class Usage(NamedTuple):
    """What a store holds.

    Attributes:
        images: How many manifests.
        nbytes: Bytes of all objects, those that no manifest names included.
        free: Bytes that there is still room for; None where nobody knows.
    """

    images: int
    nbytes: int
    free: int | None


class Writer(Protocol):
    """Puts one image into a store. What it has written goes if its `with` ends in an error."""

    def add(self, bundle: Bundle, codec: str) -> StoredObject:
        """Writes an object; one that is there already stays as it is.

        Raises:
            ColdframeError: There is no room, or it may not be written.
        """

    def publish(self, image: str, raw: bytes) -> None:
        """Writes a manifest, at once or not at all.

        Raises:
            ColdframeError: There is no room, or it may not be written.
        """


class LocalReader(Reader, Protocol):
    """Reads objects that are files of ours or root's, which nobody else can change."""

    def path_of(self, item: StoredObject) -> str | None:
        """The file that an object is; None where it is none, not whole, or its path not safe."""


class Backend(Protocol):
    """A directory or a bucket with images.

    Attributes:
        uri: Where it is.
        run_bytes: What one request best asks for.
        threads: The fewest threads that make sense.
    """

    uri: str
    run_bytes: int
    threads: int

    def documents(self, *, strict: bool) -> list[Document]:
        """All manifests; none where there is no store yet.

        Args:
            strict: Refuse what others than we and root can have put there.

        Raises:
            SnapshotError: The store cannot be read, or is not to be trusted.
        """

    def reader(self, *, strict: bool) -> AbstractContextManager[Reader]:
        """What reads objects.

        Args:
            strict: Refuse what others than we and root can have put there.

        Raises:
            SnapshotError: The store cannot be read, or is not to be trusted.
        """

    def direct(self) -> AbstractContextManager[LocalReader]:
        """What reads objects that nobody will hash.

        Raises:
            SnapshotError: The store is not on this machine, or others could write there.
        """

    def writing(self) -> AbstractContextManager[Writer]:
        """Lets one image be put into the store, which is made where there is none.

        Raises:
            SnapshotError: It cannot be made, may not be written, or others could write there.
        """

    def check_writable(self) -> None:
        """That images could be put there now, as far as that can be told at little cost.

        Raises:
            SnapshotError: They could not.
        """

    def withdraw(self, image: str) -> bool:
        """Removes a manifest; False where there is none.

        Raises:
            SnapshotError: It may not be removed, or others could write there.
        """

    def sweep(self) -> None:
        """Removes objects that no manifest names, but those that somebody may just be writing.

        What is not called as a store calls what it writes stays, whatever it is.

        Raises:
            SnapshotError: Others could write there.
        """

    def touch(self, image: str) -> None:
        """Notes that an image is used now, where that may be noted."""

    def usage(self) -> Usage:
        """What is in it."""


def image_of(name: str) -> str | None:
    """The id of the image whose manifest is called so; None where it is no manifest."""
    image = name.removesuffix(_SUFFIX)
    return image if name.endswith(_SUFFIX) and is_image_id(image) else None


def is_digest(name: str) -> bool:
    """Whether an object can be called so."""
    return _DIGEST_NAME.fullmatch(name) is not None


def named_in(raw: bytes | None) -> set[str]:
    """The objects that a manifest may name: all hashes in it.

    So one of another version keeps what it needs, whatever it looks like.
    """
    return set() if raw is None else {found.decode() for found in _DIGEST.findall(raw)}
