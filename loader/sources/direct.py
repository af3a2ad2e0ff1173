"""O_DIRECT: bytes from the disk to where they belong, past the page cache.

The disk then writes into the arena by itself: no copy, no processor time that the workers' imports
would have to share, and no second copy of the weights in memory. It asks for a price: offset,
length and address must be multiples of a block, so the ragged ends of a stretch are read the usual
way, and a layout in which address and offset agree modulo a block is what makes the rest possible.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import NamedTuple

__all__ = ["BLOCK", "Cut", "congruent", "cut", "open_direct"]

BLOCK = 4096
"""What every disk's logical block divides; a device that asks for more refuses the probe."""


def open_direct(path: str) -> int | None:
    """Opens a file for direct reads.

    Returns:
        A descriptor, or None where the file system refuses (tmpfs, some network file systems).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None
    # Some accept the flag and refuse the read: try one.
    with mmap.mmap(-1, BLOCK) as page:
        try:
            os.preadv(fd, [page], 0)
        except OSError:
            os.close(fd)
            return None
    return fd


class Cut(NamedTuple):
    """A stretch in three: `head` and `tail` bytes beside whole blocks of `body` bytes."""

    head: int
    body: int
    tail: int


def congruent(offset: int, buffer: memoryview) -> bool:
    """Whether a place in memory and an offset in a file agree modulo a block."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else offset
    return address % BLOCK == offset % BLOCK


def cut(offset: int, length: int) -> Cut:
    """How a stretch is read directly: what is ragged at its ends, and the blocks between."""
    head = min(length, -offset % BLOCK)
    body = (length - head) // BLOCK * BLOCK
    return Cut(head, body, length - head - body)
