"""Signatures of images: a key that creators and restorers share says which images to trust.

HMAC-SHA256 (RFC 2104) over the whole manifest, and so, by their hashes, over every byte of the
image. Who can write to a store but has not the key cannot bring in an image or change one. He can
take one away, or put an older one back that was signed once.
"""

from __future__ import annotations

import os
import stat

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.files import open_regular, pread_exactly
from coldframe.snapshot.manifest import Manifest

__all__ = ["check", "read_key", "sign"]

_LEAST_BYTES = 16
_MOST_BYTES = 4096
_HINT = "Sign images with the same key that restores them; remove the ones that are not."


def sign(manifest: Manifest, key: bytes) -> Manifest:
    """The manifest with its signature."""
    return manifest._replace(signature=_mac(manifest, key))


def check(manifest: Manifest, key: bytes) -> None:
    """Checks a manifest's signature.

    Raises:
        SnapshotError: It has none, or one of another key or another manifest.
    """
    import hmac

    where = f"image {manifest.id}"
    if manifest.signature is None:
        raise SnapshotError("the image is not signed", where=where, hint=_HINT)
    if not hmac.compare_digest(manifest.signature, _mac(manifest, key)):
        raise SnapshotError(
            "the image's signature is not of this key and this manifest", where=where, hint=_HINT
        )


def read_key(path: str) -> bytes:
    """The key that is in a file: all of its bytes.

    Raises:
        SnapshotError: It cannot be read, has the wrong length, is another user's, or others may
            read or write it.
    """
    hint = f"Make one: head -c 32 /dev/urandom > {path} && chmod 600 {path}"
    try:
        fd, status = open_regular(path)
        try:
            size = min(status.st_size, _MOST_BYTES + 1)
            key = pread_exactly(fd, path, size, 0)
        finally:
            os.close(fd)
    except ColdframeError as error:
        raise SnapshotError(
            "the key cannot be read", where=path, expected="a file", got=error.what, hint=hint
        ) from error
    if status.st_uid not in (0, os.geteuid()):
        raise SnapshotError(
            "the key is somebody else's",
            where=path,
            expected="a file of yours, or of root",
            got=f"a file of user {status.st_uid}",
            hint=hint,
        )
    # Root gives a key to a container by its group: that is how Kubernetes mounts secrets.
    allowed = stat.S_IRWXU | (stat.S_IRGRP if status.st_uid == 0 else 0)
    if status.st_mode & 0o777 & ~allowed:
        raise SnapshotError(
            "others may read the key, or write it",
            where=path,
            expected="mode 0600, or of root, 0440",
            got=stat.filemode(status.st_mode),
            hint=f"Make a new one, and run: chmod 600 {path}",
        )
    if not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        raise SnapshotError(
            "the key has the wrong length",
            where=path,
            expected=f"{_LEAST_BYTES} to {_MOST_BYTES} bytes",
            got=f"{status.st_size} bytes",
            hint=hint,
        )
    return key


def _mac(manifest: Manifest, key: bytes) -> str:
    import hmac

    return hmac.new(key, manifest.canonical(), "sha256").hexdigest()
