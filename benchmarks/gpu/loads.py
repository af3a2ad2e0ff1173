"""The loader's way into a GPU's memory, beside the link's own limit: the ring, and what feeds it.

All that these benchmarks use of the loader's insides is in this module.

    host RAM      readers copy from memory into the ring's buffers
    page cache    readers read the checkpoint's files, which are cached
    disk          readers read them past the page cache

Each goes through a `DevicePlacer`, by a real plan for a GPU. Sizes of chunks, numbers of readers
and of streams are tried first; what measures best is then measured in turn with the bare copy.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.bare import Bare, bare, fill, host_buffer, move
from coldframe.benchmarks.gpu.copies import HOST_COPY
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row, evict_files, warm_page_cache
from coldframe.loader.checkpoint import Checkpoint
from coldframe.loader.devices.buffers import Buffer
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.device_placer import DevicePlacer, buffer_bytes
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.ring import Ring
from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.loader.plan import Extent, Layout, Plan
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.file import FileSource

__all__ = ["Feed", "MemorySource", "load", "measure", "pieces", "rates_of"]

PINNED = "weights in pinned RAM to the device"
PAGE_CACHE = "page cache to the device"

_CHUNKS = (8 << 20, 16 << 20)
_READERS = (2, 4, 6, 8)
_STREAMS = (1, 2)
_SPARE = 4
_DISK_READERS = 8
_WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Feed:
    """One way to feed a ring.

    Args:
        chunk: Bytes that are read at once.
        readers: Threads that read.
        streams: Queues that copies alternate between.
    """

    chunk: int
    readers: int
    streams: int

    def __str__(self) -> str:
        return f"{self.readers} readers, {self.chunk / (1 << 20):g} MiB, {self.streams} streams"


class MemorySource:
    """Host memory in the place of files: a source without a disk or a page cache.

    Args:
        buffer: Read over and over.
    """

    readers = None
    chunk = None
    note = "host RAM"
    verified = None

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._size = len(buffer.view)

    def read_into(self, shard: int, offset: int, parts: Sequence[memoryview]) -> None:
        at = offset % self._size
        for part in parts:
            done = 0
            while done < len(part):
                step = min(len(part) - done, self._size - at)
                move(_address(part) + done, self._buffer.address + at, step)
                done, at = done + step, (at + step) % self._size

    def finish(self) -> None:
        return

    def abort(self) -> None:
        return

    def close(self) -> None:
        return


def _address(view: memoryview) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def pieces(plan: Plan, chunk: int, most: int) -> Iterator[tuple[Extent, int, int]]:
    """A plan's bytes in chunks, in the order of use, up to so many: extent, first, end offset."""
    left = most
    for stage in plan.stages:
        for extent in stage.extents:
            start, end = extent.file_offset, extent.file_offset + extent.length
            while start < end and left > 0:
                stop = min(end, (start // chunk + 1) * chunk, start + left)
                yield extent, start, stop
                left -= stop - start
                start = stop


def load(ring: Ring, source: Source, plan: Plan, address: int, feed: Feed, most: int) -> float:
    """Brings a plan's first bytes to the device: bytes per second.

    Args:
        ring: Connected.
        source: Where they come from.
        plan: What goes where.
        address: The arena's.
        feed: How; the ring's streams were chosen when it was connected.
        most: How many bytes.

    Raises:
        ColdframeError: They did not arrive.
    """
    todo = list(pieces(plan, feed.chunk, most))
    total = sum(stop - start for _, start, stop in todo)
    transfer = ring.transfer()
    placer = DevicePlacer(source, transfer, address)
    queue, lock = iter(todo), threading.Lock()
    left, all_in = len(todo), threading.Event()
    errors: list[ColdframeError] = []

    def arrived(error: ColdframeError | None) -> None:
        nonlocal left
        with lock:
            left -= 1
            if error is not None:
                errors.append(error)
            if left == 0 or error is not None:
                all_in.set()

    def read() -> None:
        while True:
            with lock:
                piece = None if errors else next(queue, None)
            if piece is None:
                return
            placer.fetch(*piece, arrived)

    started = time.perf_counter()
    with ThreadPoolExecutor(feed.readers) as pool:
        for future in [pool.submit(read) for _ in range(feed.readers)]:
            future.result()
    if not all_in.wait(_WAIT_S):
        raise PlatformError("copies to the device do not arrive", got=f"{left} are missing")
    if errors:
        raise errors[0]
    return total / (time.perf_counter() - started)


def measure(report: Report, setting: Setting) -> None:
    """Measures the loader beside the link."""
    rates_of(report, setting, None, Path(report.earlier.need(MODEL)))


def rates_of(report: Report, setting: Setting, api: Any, model: Path) -> None:
    """See `measure`.

    Args:
        report: Where it goes.
        setting: How much and how often.
        api: The driver's calls; None takes the bindings.
        model: A checkpoint's directory.
    """
    checkpoint = Checkpoint.open(str(model))
    plan = Plan.build(checkpoint, layout=Layout.ALIGNED)
    most = min(setting.nbytes, plan.read_bytes)
    context = Context(Driver.open(api), setting.ordinal)
    try:
        context.bind()
        arena = DeviceArena(context, plan.arena_bytes, writable=False)
        try:
            arena.grow(arena.size)
            with bare(context, most) as link:
                link.rate()
                _from(report, setting, "host RAM", _memory(link), plan, arena, link)
                files = FileSource(checkpoint.shards)
                try:
                    warm_page_cache(model)
                    _from(report, setting, "page cache", files, plan, arena, link)
                finally:
                    files.close()
                _from_disk(report, setting, checkpoint, model, plan, arena, context, most)
        finally:
            arena.close()
    finally:
        context.close()


def _memory(link: Bare) -> MemorySource:
    """Host memory of its own: the bare copy's is locked, and the caches know it."""
    buffer = host_buffer(link.nbytes)
    fill(buffer)
    return MemorySource(buffer)


def _from(
    report: Report,
    setting: Setting,
    what: str,
    source: Source,
    plan: Plan,
    arena: DeviceArena,
    link: Bare,
) -> None:
    """Finds the best feed, then measures it in turn with the bare copy and with reading alone."""
    tried: dict[Feed, float] = {}
    for feed in _feeds(setting):
        with _ring(feed, link.context) as ring:
            # The first load of a ring locks its buffers.
            load(ring, source, plan, arena.address, feed, link.nbytes // 4)
            tried[feed] = load(ring, source, plan, arena.address, feed, link.nbytes)
    feed = max(tried, key=lambda feed: tried[feed])
    rates = {str(feed): f"{rate / 1e9:.1f} GB/s" for feed, rate in tried.items()}
    report.answer(f"{what}: the fastest feed", {"best": str(feed), **rates})
    ours, theirs, alone = [], [], []
    with _ring(feed, link.context) as ring:
        load(ring, source, plan, arena.address, feed, link.nbytes)
        for _ in range(setting.runs):
            theirs.append(link.rate(1) / 1e9)
            ours.append(load(ring, source, plan, arena.address, feed, link.nbytes) / 1e9)
            alone.append(_read_alone(source, plan, feed, link.nbytes) / 1e9)
        note = ring.note
    name = f"{what} to the device"
    report.answer(f"{what}: how it was copied", note)
    report.figure(Row(name, ours, "GB/s"))
    report.figure(Row(f"  {what}: read alone, by as many readers", alone, "GB/s"))
    pairs = list(zip(ours, theirs, strict=True))
    report.figure(Row(f"{name} / bare pinned copy", [a / b for a, b in pairs], "ratio"))
    if what == "page cache":
        host = report.earlier.median(HOST_COPY)
        bounds = [a / min(0.8 * b, host) for a, b in pairs]
        limit = "page cache / the lesser of 0.8 x bare and the host's own copies"
        report.figure(Row(limit, bounds, "ratio", 1.0, at_least=True))


def _feeds(setting: Setting) -> list[Feed]:
    # Not one that leaves each reader less than two chunks.
    return [
        feed
        for feed in itertools.starmap(Feed, itertools.product(_CHUNKS, _READERS, _STREAMS))
        if feed.chunk * feed.readers * 2 <= setting.nbytes
    ] or [Feed(max(4096, setting.nbytes // 8), 2, streams) for streams in _STREAMS]


class _ring:
    """A ring for a feed, connected, as a context manager."""

    def __init__(self, feed: Feed, context: Context) -> None:
        self._ring = Ring(feed.readers + _SPARE, buffer_bytes(feed.chunk))
        try:
            self._ring.connect(context, streams=feed.streams)
        except BaseException:
            self._ring.close()
            raise

    def __enter__(self) -> Ring:
        return self._ring

    def __exit__(self, *_: object) -> None:
        self._ring.close()


def _read_alone(source: Source, plan: Plan, feed: Feed, most: int) -> float:
    """The same reads by as many threads, into buffers that nobody copies: bytes per second."""
    todo = list(pieces(plan, feed.chunk, most))
    queue, lock = iter(todo), threading.Lock()

    def read() -> None:
        view = host_buffer(buffer_bytes(feed.chunk)).view
        while True:
            with lock:
                piece = next(queue, None)
            if piece is None:
                return
            extent, start, stop = piece
            lead = start % 4096
            source.read_into(extent.shard, start, [view[lead : lead + stop - start]])

    started = time.perf_counter()
    with ThreadPoolExecutor(feed.readers) as pool:
        for future in [pool.submit(read) for _ in range(feed.readers)]:
            future.result()
    return sum(stop - start for _, start, stop in todo) / (time.perf_counter() - started)


def _from_disk(
    report: Report,
    setting: Setting,
    checkpoint: Checkpoint,
    model: Path,
    plan: Plan,
    arena: DeviceArena,
    context: Context,
    most: int,
) -> None:
    """Once: a disk is slow, and its bytes are read again only when they are evicted again."""
    files = FileSource(checkpoint.shards)
    try:
        evict_files(sorted(model.glob("*.safetensors")))
        if not files.use_direct():
            raise LeftOut("the file system has no O_DIRECT")
        feed = Feed(max(4096, min(8 << 20, setting.nbytes // 8)), _DISK_READERS, 1)
        alone = _read_alone(files, plan, feed, most) / 1e9
        with _ring(feed, context) as ring:
            rate = load(ring, files, plan, arena.address, feed, most) / 1e9
    except (LeftOut, PlatformError) as error:
        report.left_out("disk to the device", str(error))
        return
    finally:
        files.close()
    report.figure(Row("disk, read alone past the page cache", [alone], "GB/s"))
    report.figure(Row("disk to the device", [rate], "GB/s"))
