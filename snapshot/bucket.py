"""A store in a bucket of S3, or of whatever speaks its protocol.

What is read comes through the reader of ranges; listing and writing is botocore's. There are no
locks here: what no manifest names is taken for left over when it is an hour old.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from coldframe.loader.errors import ColdframeError, SnapshotError, SourceNotFound
from coldframe.loader.sources.location import S3
from coldframe.loader.web.limits import Limits
from coldframe.loader.web.ranges import RangeReader
from coldframe.loader.web.s3 import S3Address
from coldframe.loader.web.s3_refusals import clean
from coldframe.snapshot.backend import (
    MANIFESTS,
    MAX_MANIFEST_BYTES,
    OBJECTS,
    Document,
    LocalReader,
    Usage,
    image_of,
    is_digest,
    named_in,
)
from coldframe.snapshot.image_files import StoredObject
from coldframe.snapshot.manifest import is_image_id
from coldframe.snapshot.packing import Bundle, write_object

__all__ = ["BucketBackend"]

_USED = "used"
_LEFT_OVER_S = 3600.0
_FRESH_S = _LEFT_OVER_S / 2
# A start does not wait for an image for longer than a worker needs without one.
_LIMITS = Limits(patience_s=5.0, connect_s=3.0, stall_s=3.0)
_READERS = 8
_HINT = (
    "Check the bucket, the credentials, and that they allow s3:ListBucket and s3:GetObject, and to"
    " make images s3:PutObject and s3:DeleteObject."
)


class _Item(NamedTuple):
    """An object of the bucket, as a listing has it."""

    name: str
    nbytes: int
    modified: float


class BucketBackend:
    """Images in a bucket.

    Args:
        location: Bucket and prefix.
    """

    run_bytes = 4 << 20
    threads = 16

    def __init__(self, location: S3) -> None:
        self.uri = location.uri
        self._address = S3Address(location)
        self._withdrawn: set[str] = set()

    # Who may write to a bucket is its policy's business, and only a key says more: here `strict`
    # asks for nothing.

    def documents(self, *, strict: bool) -> list[Document]:
        return self._read_documents(self._list())

    @contextlib.contextmanager
    def reader(self, *, strict: bool) -> Iterator[_Reader]:
        reader = _Reader(self._range_reader())
        try:
            yield reader
        finally:
            reader.close()

    def direct(self) -> contextlib.AbstractContextManager[LocalReader]:
        raise SnapshotError(
            "an image from a bucket cannot be used without checking it",
            where=self.uri,
            got="nothing else would check what comes over the network",
            hint="Have images checked, or keep them in a directory of this machine.",
        )

    @contextlib.contextmanager
    def writing(self) -> Iterator[_Writer]:
        with self._told("the store cannot be written"):
            writer = _Writer(self, self._address)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(ColdframeError):
                self._remove_unnamed(set(writer.made))
            raise
        finally:
            self._address.close()

    def check_writable(self) -> None:
        try:
            with self._told("the store cannot be listed"):
                self._address.client.list_objects_v2(
                    Bucket=self._address.bucket, Prefix=self._address.key(""), MaxKeys=1
                )
        finally:
            self._address.close()

    def withdraw(self, image: str) -> bool:
        if not is_image_id(image):
            return False
        name = _manifest_name(image)
        reader = self._range_reader()
        try:
            with self._told("the image cannot be removed"):
                try:
                    named = named_in(reader.read_small(name, MAX_MANIFEST_BYTES))
                except SourceNotFound:
                    return False
                self._delete([name, f"{_USED}/{image}"])
        finally:
            reader.close()
            self._address.close()
        self._withdrawn |= named
        return True

    def sweep(self) -> None:
        with contextlib.suppress(ColdframeError):
            self._remove_unnamed(self._withdrawn)
            self._withdrawn = set()

    def touch(self, image: str) -> None:
        with contextlib.suppress(ColdframeError), self._told("the use of an image is not noted"):
            self.put(f"{_USED}/{image}", b"")
        self._address.close()

    def usage(self) -> Usage:
        items = self._list()
        images = sum(_image_in(item) is not None for item in items)
        nbytes = sum(item.nbytes for item in items if _digest_in(item) is not None)
        return Usage(images, nbytes, None)

    def put(self, name: str, content: bytes) -> None:
        """Writes a small object."""
        bucket, key = self._address.bucket, self._address.key(name)
        self._address.client.put_object(Bucket=bucket, Key=key, Body=content)

    def _list(self) -> list[_Item]:
        prefix = self._address.key("")
        try:
            with self._told("the store cannot be listed"):
                pages = self._address.client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._address.bucket, Prefix=prefix
                )
                return [
                    _Item(
                        found["Key"].removeprefix(prefix),
                        found["Size"],
                        found["LastModified"].timestamp(),
                    )
                    for page in pages
                    for found in page.get("Contents", ())
                ]
        finally:
            self._address.close()

    def _read_documents(self, items: list[_Item]) -> list[Document]:
        used = {item.name: item.modified for item in items}
        todo = [(image, item) for item in items if (image := _image_in(item)) is not None]
        found: list[Document] = []
        reader = self._range_reader()

        def work() -> None:
            while True:
                try:
                    image, item = todo.pop()
                except IndexError:
                    return
                last = max(item.modified, used.get(f"{_USED}/{image}", 0.0))
                try:
                    raw = reader.read_small(item.name, MAX_MANIFEST_BYTES)
                except SourceNotFound:
                    continue  # removed just now
                except ColdframeError as error:
                    found.append(Document(image, None, str(error), last))
                else:
                    found.append(Document(image, raw, "", last))

        try:
            helpers = [threading.Thread(target=work, daemon=True) for _ in todo[1:_READERS]]
            for helper in helpers:
                helper.start()
            work()
            for helper in helpers:
                helper.join()
        finally:
            reader.close()
        return found

    def _remove_unnamed(self, at_once: set[str]) -> None:
        """Removes the objects that no manifest names: old ones, and those that are given."""
        items = self._list()
        documents = self._read_documents(items)
        if any(document.raw is None for document in documents):
            return  # nobody knows what those name
        named = set().union(*(named_in(document.raw) for document in documents))
        limit = time.time() - _LEFT_OVER_S
        left = [
            item.name
            for item in items
            if (digest := _digest_in(item)) is not None
            and digest not in named
            and (digest in at_once or item.modified < limit)
        ]
        try:
            with self._told("left-over objects cannot be removed"):
                self._delete(left)
        finally:
            self._address.close()

    def _delete(self, names: list[str]) -> None:
        # One by one: to delete several in one request not every store knows, and there are few.
        for name in names:
            self._address.client.delete_object(
                Bucket=self._address.bucket, Key=self._address.key(name)
            )

    def _range_reader(self) -> RangeReader:
        address = self._address
        return RangeReader(address, limits=_LIMITS, ca_file=lambda: address.ca_bundle)

    def _told(self, what: str) -> contextlib.AbstractContextManager[None]:
        return told(what, self.uri)


@contextlib.contextmanager
def told(what: str, where: str) -> Iterator[None]:
    """Makes SnapshotErrors of what botocore and the reader of ranges raise."""
    try:
        yield
    except SnapshotError:
        raise
    except ColdframeError as error:
        raise SnapshotError(
            f"{what}: {error.what}",
            where=error.where or where,
            expected=error.expected,
            got=error.got,
            hint=error.hint,
        ) from error
    except Exception as error:
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

        if not isinstance(error, BotoCoreError | ClientError):
            raise
        raise SnapshotError(what, where=where, got=clean(str(error)), hint=_HINT) from None


class _Writer:
    def __init__(self, backend: BucketBackend, address: S3Address) -> None:
        self.made: list[str] = []
        self._backend = backend
        self._address = address
        self._client: Any = address.client
        self._needed: list[StoredObject] = []

    def add(self, bundle: Bundle, codec: str) -> StoredObject:
        # An object's name is the hash of all of it, so it has to be there before it is sent.
        try:
            with tempfile.TemporaryFile() as file:
                item = write_object(bundle, file.fileno(), codec)
                file.seek(0)
                if not self._is_there(item, fresh=True):
                    with told("an image cannot be written to the store", self._backend.uri):
                        self._send(item, file)
                    self.made.append(item.digest)
        except OSError as error:
            raise SnapshotError(
                "an image cannot be packed",
                where=tempfile.gettempdir(),
                expected=f"room for {bundle.size} bytes at most",
                got=error.strerror,
                hint="Set TMPDIR to a directory with more room.",
            ) from error
        self._needed.append(item)
        return item

    def publish(self, image: str, raw: bytes) -> None:
        for item in self._needed:
            if not self._is_there(item, fresh=False):
                raise SnapshotError(
                    "a part of the image was removed before it was complete",
                    where=f"{self._backend.uri}, object {item.digest}",
                    hint="Start again.",
                )
        with told("a manifest cannot be written to the store", self._backend.uri):
            self._backend.put(_manifest_name(image), raw)

    def _is_there(self, item: StoredObject, *, fresh: bool) -> bool:
        """Whether an object is in the bucket; with `fresh`, only if none may take it for old."""
        from botocore.exceptions import ClientError

        with told("the store cannot be asked", self._backend.uri):
            try:
                head = self._client.head_object(
                    Bucket=self._address.bucket, Key=self._address.key(_object_name(item))
                )
            except ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                    return False
                if fresh:
                    return False  # who may write need not be allowed to ask
                raise
        age = time.time() - head["LastModified"].timestamp()
        return bool(head["ContentLength"] == item.stored_bytes and (not fresh or age < _FRESH_S))

    def _send(self, item: StoredObject, file: Any) -> None:
        from s3transfer.manager import TransferManager  # type: ignore[import-untyped]

        with TransferManager(self._client) as transfers:
            transfers.upload(
                file,
                self._address.bucket,
                self._address.key(_object_name(item)),
                extra_args={"ChecksumAlgorithm": "SHA256"},
            ).result()


class _Reader:
    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader

    def read(self, item: StoredObject, offset: int, buffer: memoryview) -> None:
        # Without a version: every byte is held against its hash.
        self._reader.read_into(_object_name(item), "", item.stored_bytes, offset, [buffer])

    def close(self) -> None:
        self._reader.close()


def _object_name(item: StoredObject) -> str:
    return f"{OBJECTS}/{item.digest}"


def _manifest_name(image: str) -> str:
    return f"{MANIFESTS}/{image}.json"


def _image_in(item: _Item) -> str | None:
    folder, name = os.path.split(item.name)
    return image_of(name) if folder == MANIFESTS else None


def _digest_in(item: _Item) -> str | None:
    """The hash that an object is called by; None for what no store has written."""
    folder, name = os.path.split(item.name)
    return name if folder == OBJECTS and is_digest(name) else None
