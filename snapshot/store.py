"""Where images are kept: written whole or not at all, and checked when they are read.

A store is a directory or a bucket; what is the same for both is here. Stores hold several images
of a model, for several machines; `choose` says which is used.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot import signing
from coldframe.snapshot.backend import Backend, Document, Usage
from coldframe.snapshot.directory import DirectoryBackend
from coldframe.snapshot.manifest import Draft, Manifest
from coldframe.snapshot.packing import bundles, codec_of, files_of
from coldframe.snapshot.unpacking import Reader, unpack

__all__ = ["Skipped", "Store", "Usage", "open_store"]


class Skipped(NamedTuple):
    """An image that is in a store and cannot be used.

    Attributes:
        id: Its id.
        why: What is wrong with its manifest.
    """

    id: str
    why: str


class Store:
    """Images in a directory or a bucket.

    Args:
        backend: The place.
        key: What images are signed with; where it is given, others are refused.
    """

    def __init__(self, backend: Backend, key: bytes | None = None) -> None:
        self._backend = backend
        self._key = key

    @property
    def uri(self) -> str:
        """Where it is."""
        return self._backend.uri

    def check_writable(self) -> None:
        """That images could be put here, before the work of making one.

        A directory is made and tried; a bucket is only asked whether it can be listed.

        Raises:
            SnapshotError: It cannot be made, may not be written, or others could write there.
        """
        self._backend.check_writable()

    def put(
        self,
        image_dir: str | os.PathLike[str],
        draft: Draft,
        *,
        compress: str = "auto",
        finish: Callable[[Manifest], Manifest] | None = None,
    ) -> Manifest:
        """Stores an image.

        Args:
            image_dir: What CRIU has written; logs and statistics are left out.
            draft: What is known of it.
            compress: `auto` or `lz4`, or `none` for images that are to be used in place.
            finish: Called when the image can be fetched and before others can see it; gives the
                manifest with its oracle. If it raises, there is no image.

        Raises:
            SnapshotError: There is no room, it may not be written, or it is no image.
        """
        codec = codec_of(compress)
        packed = bundles(os.fspath(image_dir))
        with self._backend.writing() as writer:
            manifest = Manifest(
                round(time.time(), 3),
                *draft,
                objects=tuple(writer.add(bundle, codec) for bundle in packed),
                files=files_of(packed),
            )
            if finish is not None:
                finished = finish(self._signed(manifest))
                if finished.id != manifest.id:
                    raise SnapshotError(
                        "the manifest of another image came back",
                        where=self.uri,
                        expected=manifest.id,
                        got=finished.id,
                    )
                manifest = finished
            manifest = self._signed(manifest)
            # Nobody is to find out later that it cannot be read.
            Manifest.decode(manifest.encode(), f"image {manifest.id}")
            writer.publish(manifest.id, manifest.encode())
        return manifest

    def manifests(self) -> tuple[list[Manifest], list[Skipped]]:
        """The images that can be used, newest first, and those that cannot.

        Raises:
            SnapshotError: The store cannot be read, or is not to be trusted.
        """
        found, skipped = [], []
        for document in self._backend.documents(strict=self._key is None):
            try:
                found.append(self._read(document))
            except SnapshotError as error:
                skipped.append(Skipped(document.id, str(error)))
        found.sort(key=lambda manifest: manifest.created, reverse=True)
        return found, sorted(skipped)

    def fetch(
        self,
        manifest: Manifest,
        into: str | os.PathLike[str],
        *,
        threads: int = 2,
        vouched: bool = False,
    ) -> None:
        """Copies an image into a directory, each byte of it checked on the way.

        Args:
            manifest: The image.
            into: The directory: best a tmpfs that is mounted `huge=within_size`.
            threads: How many, at least.
            vouched: Whether the manifest has been found to be one that nobody else could have
                written. Then its hashes say enough of the rest, whosever that seems to be.

        Raises:
            SnapshotError: Something of it is missing, was changed or cannot be read; or there is
                no room. What was copied is removed.
        """
        if self._key is not None:
            signing.check(manifest, self._key)
        with self._backend.reader(strict=self._key is None and not vouched) as reader:
            self._unpack(manifest, os.fspath(into), reader, threads, verify=True)

    def direct(self, manifest: Manifest, into: str | os.PathLike[str], *, threads: int = 2) -> None:
        """Makes an image usable in a directory without checking it, and if possible in place.

        What is stored as it is becomes a symbolic link; the rest is copied.

        Args:
            manifest: The image.
            into: The directory.
            threads: How many, at least.

        Raises:
            SnapshotError: As in `fetch`, as far as it is noticed; or the store is a bucket, or
                others could write to it, for then something has to check what is read.
        """
        if self._key is not None:
            signing.check(manifest, self._key)
        root = os.fspath(into)
        linked: dict[str, str] = {}
        with self._backend.direct() as reader:
            for file in manifest.files:
                item = manifest.objects[file.object_index]
                if item.codec == "raw" and item.size == file.size:
                    path = reader.path_of(item)
                    if path is not None:
                        linked[file.name] = path
            leave = frozenset(linked)
            self._unpack(manifest, root, reader, threads, verify=False, leave=leave)
        try:
            for name, path in linked.items():
                os.symlink(path, os.path.join(root, name))
        except OSError as error:
            raise SnapshotError(
                "the image cannot be linked", where=root, got=error.strerror
            ) from error

    def touch(self, image: str) -> None:
        """Notes that an image is used now, where the store may be written."""
        self._backend.touch(image)

    def remove(self, image: str) -> None:
        """Removes an image, whether it can be used or not.

        Raises:
            SnapshotError: There is none, or it may not be removed.
        """
        if not self._backend.withdraw(image):
            raise SnapshotError(
                "there is no such image",
                where=self.uri,
                got=image,
                hint="See which there are: coldframe snapshot list.",
            )
        self._backend.sweep()

    def prune(
        self,
        *,
        max_bytes: int | None = None,
        max_age_s: float | None = None,
        keep: frozenset[str] = frozenset(),
    ) -> list[str]:
        """Removes the images that were not used for longest, and what no image needs.

        Args:
            max_bytes: What the images may take together.
            max_age_s: How long ago an image may have been used last.
            keep: Ids of images that stay in any case.

        Returns:
            The ids of those that were removed.

        Raises:
            SnapshotError: The store cannot be read, or one may not be removed.
        """
        now, total, counted = time.time(), 0, set[str]()
        removed = []
        documents = sorted(
            self._backend.documents(strict=True), key=lambda found: found.used, reverse=True
        )
        for document in sorted(documents, key=lambda found: found.id not in keep):
            sizes = _sizes(document)
            new = sum(nbytes for digest, nbytes in sizes.items() if digest not in counted)
            old = max_age_s is not None and now - document.used > max_age_s
            large = max_bytes is not None and total + new > max_bytes
            if (old or large) and document.id not in keep:
                if self._backend.withdraw(document.id):
                    removed.append(document.id)
                continue
            counted.update(sizes)
            total += new
        self._backend.sweep()
        return removed

    def usage(self) -> Usage:
        """What is in it.

        Raises:
            SnapshotError: The store cannot be read.
        """
        return self._backend.usage()

    def _signed(self, manifest: Manifest) -> Manifest:
        if self._key is None:
            return manifest._replace(signature=None)
        return signing.sign(manifest, self._key)

    def _read(self, document: Document) -> Manifest:
        where = f"{self.uri}, image {document.id}"
        if document.raw is None:
            raise SnapshotError("the manifest cannot be read", where=where, got=document.why)
        manifest = Manifest.decode(document.raw, where)
        if manifest.id != document.id:
            raise SnapshotError(
                "the manifest is not what its name says",
                where=where,
                expected=document.id,
                got=manifest.id,
            )
        if self._key is not None:
            signing.check(manifest, self._key)
        return manifest

    def _unpack(
        self,
        manifest: Manifest,
        into: str,
        reader: Reader,
        threads: int,
        *,
        verify: bool,
        leave: frozenset[str] = frozenset(),
    ) -> None:
        unpack(
            manifest.objects,
            [file for file in manifest.files if file.name not in leave],
            into,
            reader,
            threads=max(threads, self._backend.threads),
            run_bytes=self._backend.run_bytes,
            verify=verify,
        )


def open_store(location: str, *, key: bytes | None = None) -> Store:
    """The store at a place. Nothing is read, written or asked before it is used.

    Args:
        location: A directory, which need not be there, or `s3://bucket/prefix`.
        key: What images are signed with; where it is given, others are refused.

    Raises:
        SnapshotError: There can be no store there.
        RequestError: That is not how a bucket is written.
    """
    scheme, separator, _ = location.partition("://")
    if not separator and location:
        return Store(DirectoryBackend(os.path.expanduser(location)), key)
    if scheme != "s3":
        raise SnapshotError(
            "there can be no store of images there",
            where=location.split("?")[0],
            expected="a directory or s3://bucket/prefix",
            hint="Name a place that can be written.",
        )
    from coldframe.loader.sources.location import S3, parse_location
    from coldframe.snapshot.bucket import BucketBackend

    place = parse_location(location)
    assert isinstance(place, S3)
    return Store(BucketBackend(place), key)


def _sizes(document: Document) -> dict[str, int]:
    """The stored bytes of an image's objects, by their hashes; of what cannot be read, nothing."""
    try:
        manifest = Manifest.decode(document.raw or b"")
    except SnapshotError:
        return {}
    return {item.digest: item.stored_bytes for item in manifest.objects}
