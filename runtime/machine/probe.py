"""How fast weights come from where they are: a moment of reading, before anything is loaded."""

from __future__ import annotations

import math
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from typing import NamedTuple

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.errors import SourceUnreachable
from coldframe.loader.sources.base import Origin, Source
from coldframe.loader.sources.direct import BLOCK
from coldframe.loader.sources.file import FileSource

__all__ = ["MOSTLY", "Bandwidth", "probe", "probe_cold"]

MOSTLY = 0.9
"""What has this share in the page cache is mapped where it lies; see `loader.loads.load`."""

_DISK_BYTES = 64 << 20
_DISK_S = 0.25
_DISK_CHUNK = 4 << 20
_COLD_S = 0.4

_NETWORK_S = 1.0
_LATEST_S = 10.0
"""When a network must have given something."""
_THREADS = 8
_FIRST_CHUNK = 64 << 10
_CHUNK = 8 << 20
_QUICK_S = 0.1
"""A read that takes less is followed by one of twice its size."""


class Bandwidth(NamedTuple):
    """How the weights will come: bytes per second, how that is known, and what it takes.

    Attributes:
        rate: Bytes a second.
        source: How that is known.
        processor_s: Processor time that a byte took on its way to memory that was there already;
            None where that was not looked at.
    """

    rate: float
    source: str
    processor_s: float | None = None


def probe(origin: Origin, checkpoint: Checkpoint, plan: Plan, *, maps: bool = True) -> Bandwidth:
    """The bandwidth of the path from a place.

    Args:
        origin: The place.
        checkpoint: The checkpoint that was opened there.
        plan: Its plan.
        maps: Whether files that are cached can be mapped where they are.

    Raises:
        SourceError: The weights cannot be read.
    """
    if origin.path is not None:
        return _probe_disk(checkpoint, maps=maps)
    with closing(origin.open_source(checkpoint.shards)) as source:
        return _Reading(source, checkpoint, plan, _NETWORK_S).probe()


def probe_cold(checkpoint: Checkpoint, plan: Plan) -> Bandwidth:
    """The bandwidth of the disk, whatever of the files is in the page cache: as a load reads it.

    Args:
        checkpoint: One in a local directory.
        plan: Its plan.

    Raises:
        SourceError: The weights cannot be read.
    """
    source = FileSource(checkpoint.shards)
    try:
        if not source.use_direct():
            return _probe_disk(checkpoint, maps=False)
        reading = _Reading(source, checkpoint, plan, _COLD_S, first=_DISK_CHUNK)
        return Bandwidth(reading.probe().rate, "probed, past the page cache")
    finally:
        source.close()


def _probe_disk(checkpoint: Checkpoint, *, maps: bool) -> Bandwidth:
    """Reads the first shard for a moment, unless a load would map the files.

    A kernel may drop a page at any time, so that hardly ever every last one is there.
    """
    source = FileSource(checkpoint.shards)
    buffer = memoryview(bytearray(_DISK_CHUNK))
    size = checkpoint.shards[0].size
    try:
        total = sum(shard.size for shard in checkpoint.shards)
        if maps and source.cached_bytes() >= MOSTLY * total:
            return Bandwidth(math.inf, "cached, mapped in place")
        cached = cached_bytes(source.fds[0], 0, size) >= MOSTLY * size
        started, done = time.monotonic(), 0
        while done < min(size, _DISK_BYTES) and time.monotonic() - started < _DISK_S:
            count = min(_DISK_CHUNK, size - done)
            source.read_into(0, done, [buffer[:count]])
            done += count
        # What this read brought into the page cache would make the next start look faster.
        if not cached:
            os.posix_fadvise(source.fds[0], 0, done, os.POSIX_FADV_DONTNEED)
        return Bandwidth(done / (time.monotonic() - started), "probed")
    finally:
        source.close()


class _Reading:
    """Several reads at once, in the order of use: a peer that loads has the first stages first."""

    def __init__(
        self,
        source: Source,
        checkpoint: Checkpoint,
        plan: Plan,
        seconds: float,
        *,
        first: int = _FIRST_CHUNK,
    ) -> None:
        self._source = source
        self._seconds = seconds
        self._first = first
        self._uri = checkpoint.path
        self._extents = (extent for stage in plan.stages for extent in stage.extents)
        self._current = next(self._extents)
        self._at = self._current.file_offset
        self._lock = threading.Lock()
        self._ends = 0.0
        self._done = 0

    def probe(self) -> Bandwidth:
        """Reads until time is up, or all has been read."""
        ran = time.process_time()
        started = time.monotonic()
        self._ends = started + self._seconds
        with ThreadPoolExecutor(_THREADS) as pool:
            reads = [pool.submit(self._read) for _ in range(_THREADS)]
            _, late = wait(reads, timeout=_LATEST_S)
            if late:
                self._source.abort()
        for read in reads:
            if read not in late:
                read.result()
        if not self._done:
            raise SourceUnreachable(
                "nothing came, so that no rate can be told",
                where=self._uri,
                expected=f"some bytes in {_LATEST_S:g} s",
                hint="Give the path's bandwidth, as --rate 2GB/s.",
            )
        took, ran = time.monotonic() - started, time.process_time() - ran
        return Bandwidth(self._done / took, "probed", ran / self._done)

    def _read(self) -> None:
        size = self._first
        room = memoryview(mmap.mmap(-1, _CHUNK + BLOCK))
        while (started := time.monotonic()) < self._ends:
            found = self._next(size)
            if found is None:
                return
            shard, offset, length = found
            # Where a direct read needs no bounce, as it needs none in an arena.
            start = offset % BLOCK
            self._source.read_into(shard, offset, [room[start : start + length]])
            with self._lock:
                self._done += length
            if time.monotonic() - started < _QUICK_S:
                size = min(_CHUNK, 2 * size)

    def _next(self, size: int) -> tuple[int, int, int] | None:
        """Shard, offset and length of what is to be read next; None where all has been."""
        with self._lock:
            extent, start = self._current, self._at
            end = extent.file_offset + extent.length
            if start == end:
                following = next(self._extents, None)
                if following is None:
                    return None
                extent = self._current = following
                start = extent.file_offset
                end = start + extent.length
            self._at = min(end, start + size)
            return extent.shard, start, self._at - start
