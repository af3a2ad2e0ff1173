"""One KV block as a file: a header that says what it is, and the block's bytes.

    bytes 0 to 3     magic
    bytes 4 to 7     version
    bytes 8 to 15    length of the block
    bytes 16 to 47   the block's key
    bytes 48 to 63   XXH3 (128 bits) of the block

A file is good where its header is the very one that its bytes and its key call for. The hash is
that of the weights' seals: it tells bytes that were altered by accident, and passes memory at tens
of gigabytes a second. It is no protection from whoever may write here.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence

from coldframe.loader.checkpoints.pieces import hash_package

__all__ = ["HEADER_BYTES", "VERSION", "read_block", "write_block"]

VERSION = 1
"""Of the header and of how KV is computed: raise it when blocks of before must not be used."""

_HEADER = struct.Struct("<4sIQ32s16s")
_MAGIC = b"CFKV"
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW

HEADER_BYTES = _HEADER.size


def write_block(path: str, key: str, block: memoryview, used_ns: int) -> None:
    """Writes a file that is not there yet.

    Args:
        path: Where.
        key: The block's, in hexadecimal.
        block: Its bytes.
        used_ns: When it was used last, as the file's time is to say.

    Raises:
        OSError: It cannot be written. A part of it may be there.
    """
    fd = os.open(path, _WRITE, 0o600)
    try:
        left = [memoryview(_header(key, block)), block]
        while left:
            left = _behind(left, os.writev(fd, left))
        os.utime(fd, ns=(used_ns, used_ns))
    finally:
        os.close(fd)


def read_block(path: str, key: str, into: memoryview, used_ns: int) -> bool:
    """Reads a block to its place.

    Args:
        path: The file.
        key: The block's, in hexadecimal.
        into: Its place, of its size. What is there afterwards is of no use unless the file is good.
        used_ns: When it is used, for the file's time.

    Returns:
        Whether the file is good.

    Raises:
        OSError: It is not there or cannot be read.
    """
    fd = os.open(path, _READ)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size != HEADER_BYTES + len(into):
            return False
        header = bytearray(HEADER_BYTES)
        left, at = [memoryview(header), into], 0
        while left:
            count = os.preadv(fd, left, at)
            if not count:
                return False  # it was cut meanwhile
            left, at = _behind(left, count), at + count
        if header != _header(key, into):
            return False
        try:
            os.utime(fd, ns=(used_ns, used_ns))
        except OSError:  # a file system that may only be read: it keeps its age
            return True
        return True
    finally:
        os.close(fd)


def _header(key: str, block: memoryview) -> bytes:
    digest = hash_package().xxh3_128_digest(block)
    return _HEADER.pack(_MAGIC, VERSION, len(block), bytes.fromhex(key), digest)


def _behind(parts: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of some buffers behind their first bytes."""
    left = []
    for part in parts:
        skipped = min(count, len(part))
        count -= skipped
        if skipped < len(part):
            left.append(part[skipped:])
    return left
