"""The board: how far the stream is, in a page of shared memory that all may read.

The memory service alone writes it. It shows progress; what a worker *acts* on is the `stage`
message on its socket, which is sent after the bytes are in place and so also orders memory
between the processors of machines that do not order plain stores (arm64).

Layout, in little-endian 64-bit words: magic, version, number of stages, bytes in all, bytes
done, then for each stage its state, its bytes done and when it was ready (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from enum import IntEnum
from typing import NamedTuple

from coldframe.loader.arena import round_up
from coldframe.loader.errors import ArenaError
from coldframe.loader.timeline import now

__all__ = ["Board", "BoardView", "Progress", "StageState"]

_MAGIC = int.from_bytes(b"CFBOARD1", "little")
_VERSION = 1
_HEADER = 5
_PER_STAGE = 3
_F_SEAL_FUTURE_WRITE = 0x0010


class StageState(IntEnum):
    PENDING = 0
    READY = 1
    FAILED = 2


class Progress(NamedTuple):
    """How far the stream is, in bytes."""

    done: int
    total: int


class Board:
    """The memory service's side: it creates and writes the board."""

    def __init__(self, stage_bytes: list[int]) -> None:
        self._stages = len(stage_bytes)
        size = round_up(8 * (_HEADER + _PER_STAGE * self._stages), mmap.PAGESIZE)
        self.fd = os.memfd_create("coldframe-board", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._words = memoryview(self._map).cast("Q")
        self._lock = threading.Lock()
        self._words[1] = _VERSION
        self._words[2] = self._stages
        self._words[3] = sum(stage_bytes)
        self._words[0] = _MAGIC
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        # No later mapping may write. A kernel before 5.1 lacks this seal.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)

    def advance(self, stage: int, nbytes: int) -> None:
        with self._lock:
            self._words[4] += nbytes
            self._words[_slot(stage) + 1] += nbytes

    def settle(self, stage: int, state: StageState) -> None:
        slot = _slot(stage)
        self._words[slot + 2] = now()
        self._words[slot] = state

    def state(self, stage: int) -> StageState:
        return StageState(self._words[_slot(stage)])

    @property
    def progress(self) -> Progress:
        return Progress(self._words[4], self._words[3])

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self.fd)


class BoardView:
    """Everybody else's side: a read-only map of the board.

    Args:
        fd: As it was received; closed here in any case.

    Raises:
        ArenaError: The descriptor is not a board, or one of another version.
    """

    def __init__(self, fd: int) -> None:
        try:
            size = os.fstat(fd).st_size
            if not size or size % mmap.PAGESIZE:
                raise _no_board(f"{size} bytes")
            self._map = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        magic, version, self.stages = self._words[:3]
        if magic != _MAGIC or version != _VERSION:
            self.close()
            raise _no_board(f"{magic:#x}, {version}")

    def state(self, stage: int) -> StageState:
        return StageState(self._words[_slot(stage)])

    def ready_ns(self, stage: int) -> int:
        """When the stage was settled, in CLOCK_MONOTONIC; 0 while it is pending."""
        return self._words[_slot(stage) + 2]

    @property
    def progress(self) -> Progress:
        return Progress(self._words[4], self._words[3])

    def close(self) -> None:
        self._words.release()
        self._map.close()


def _no_board(got: str) -> ArenaError:
    return ArenaError(
        "this is no board of this version",
        expected=f"magic {_MAGIC:#x}, version {_VERSION}",
        got=got,
        hint="Run one version of coldframe in all processes.",
    )


def _slot(stage: int) -> int:
    return _HEADER + _PER_STAGE * stage
