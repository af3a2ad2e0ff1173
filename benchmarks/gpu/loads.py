"""The loader's way into a GPU's memory, beside the link's own limit: the ring, and what feeds it.

    host RAM      readers copy from memory into the ring's buffers
    page cache    readers read the checkpoint's files, which are cached
    disk          readers read them past the page cache
    pinned RAM    all weights, as they come back to a replica that was parked; no ring

The others go through a `DevicePlacer`, by a real plan for a GPU (`feeding`). Sizes of chunks and
numbers of readers and streams are tried first; what is fastest is then measured in turn with the
bare copy.
"""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.bare import Bare, bare, fill, fitting, host_buffer
from coldframe.benchmarks.gpu.copies import HOST_COPY
from coldframe.benchmarks.gpu.feeding import ConnectedRing, Feed, MemorySource, load, read_alone
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row, evict_files, warm_page_cache
from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.parked import stretches_of
from coldframe.loader.devices.pinned import PinnedWeights
from coldframe.loader.devices.ring import Ring
from coldframe.loader.errors import DeviceError, PlatformError
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.direct import BLOCK
from coldframe.loader.sources.file import FileSource

__all__ = ["PINNED", "measure", "rates_of"]

PINNED = "weights in pinned RAM to the device"

_CHUNKS = (8 << 20, 16 << 20)
_READERS = (2, 4, 6, 8)
_STREAMS = (1, 2)
_DISK_READERS = 8
_TRIAL = 4
"""The part of the bytes that a feed is tried with."""
_PAGE_CACHE = 0.8
_PINNED = 0.95


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
    context = Context(Driver.open(api), setting.ordinal)
    try:
        most = min(fitting(setting.nbytes, context), plan.read_bytes)
        arena = DeviceArena(context, plan.arena_bytes, writable=False)
        try:
            arena.grow(arena.size)
            with bare(context, most) as link:
                link.rate()
                ways = _Ways(report, setting.runs, plan, arena, link)
                ways.from_memory()
                ways.from_page_cache(model, checkpoint)
                ways.from_pinned()
                ways.from_disk(model, checkpoint)
        finally:
            arena.close()
    finally:
        context.close()


@dataclass(frozen=True, slots=True)
class _Ways:
    """The ways to one arena, each beside the link.

    Args:
        report: Where figures go.
        runs: How often each is measured.
        plan: What goes where.
        arena: Whole.
        link: Its bytes are also how many of the plan's are loaded.
    """

    report: Report
    runs: int
    plan: Plan
    arena: DeviceArena
    link: Bare

    def from_memory(self) -> None:
        # Memory of its own: the bare copy's is locked, and the caches know it.
        buffer = host_buffer(self.link.nbytes)
        fill(buffer)
        self._through_ring("host RAM", MemorySource(buffer))

    def from_page_cache(self, model: Path, checkpoint: Checkpoint) -> None:
        warm_page_cache(model)
        with closing(FileSource(checkpoint.shards)) as files:
            ratios = self._through_ring("page cache", files)
        limit = "page cache / the lesser of 0.8 x bare and the host's own copies"
        try:
            host = self.report.earlier.median(HOST_COPY)
        except LeftOut as error:
            self.report.left_out(limit, str(error))
            return
        bounds = [ours / min(_PAGE_CACHE * theirs, host) for ours, theirs in ratios]
        self.report.figure(Row(limit, bounds, "ratio", 1.0, at_least=True))

    def _through_ring(self, what: str, source: Source) -> list[tuple[float, float]]:
        """Finds the best feed, then measures it in turn with the bare copy and reading alone.

        Returns:
            Our rate and that of the bare copy in each run, in GB/s.
        """
        tried = {feed: self._try(feed, source) for feed in _feeds(self.link.nbytes)}
        feed = max(tried, key=lambda feed: tried[feed])
        rates = {str(feed): f"{rate / 1e9:.1f} GB/s" for feed, rate in tried.items()}
        self.report.answer(f"{what}: the fastest feed", {"best": str(feed), **rates})
        pairs, alone = [], []
        with ConnectedRing(feed, self.link.context) as ring:
            self._load(ring, source, feed)
            for _ in range(self.runs):
                theirs = self.link.rate() / 1e9
                pairs.append((self._load(ring, source, feed) / 1e9, theirs))
                alone.append(read_alone(source, self.plan, feed, self.link.nbytes) / 1e9)
            note = ring.note
        self.report.answer(f"{what}: how it was copied", note)
        name = f"{what} to the device"
        self.report.figure(Row(name, [ours for ours, _ in pairs], "GB/s"))
        self.report.figure(Row(f"  {what}: read alone, by as many readers", alone, "GB/s"))
        ratios = [ours / theirs for ours, theirs in pairs]
        self.report.figure(Row(f"{name} / bare pinned copy", ratios, "ratio"))
        return pairs

    def _try(self, feed: Feed, source: Source) -> float:
        with ConnectedRing(feed, self.link.context) as ring:
            # A ring's first load locks its buffers.
            self._load(ring, source, feed, _TRIAL)
            return self._load(ring, source, feed, _TRIAL)

    def _load(self, ring: Ring, source: Source, feed: Feed, part: int = 1) -> float:
        most = self.link.nbytes // part
        return load(ring, source, self.plan, self.arena.address, feed, most)

    def from_pinned(self) -> None:
        """All weights out of locked host memory, as they come back to a replica that was parked."""
        rates: list[float] = []
        ratios: list[float] = []
        try:
            with closing(PinnedWeights(self.arena, stretches_of(self.plan))) as weights:
                started = time.perf_counter()
                weights.keep(lambda: None)
                kept_s = time.perf_counter() - started
                for _ in range(self.runs):
                    theirs = self.link.rate()
                    started = time.perf_counter()
                    weights.bring(lambda stage: None, lambda: None)
                    rate = self.plan.weights_bytes / (time.perf_counter() - started)
                    rates.append(rate / 1e9)
                    ratios.append(rate / theirs)
        except DeviceError as error:
            self.report.left_out(PINNED, str(error))
            return
        self.report.figure(Row(PINNED, rates, "GB/s"))
        self.report.figure(Row("  kept there for the first time", [kept_s], "s"))
        name = f"{PINNED} / bare pinned copy"
        self.report.figure(Row(name, ratios, "ratio", _PINNED, at_least=True))

    def from_disk(self, model: Path, checkpoint: Checkpoint) -> None:
        """Once: a disk is slow, and its bytes are read again only when they are evicted again."""
        most = self.link.nbytes
        feed = Feed(max(BLOCK, min(8 << 20, most // 8)), _DISK_READERS, 1)
        try:
            with closing(FileSource(checkpoint.shards)) as files:
                evict_files(sorted(model.glob("*.safetensors")))
                if not files.use_direct():
                    raise LeftOut("the file system has no O_DIRECT")
                alone = read_alone(files, self.plan, feed, most) / 1e9
                with ConnectedRing(feed, self.link.context) as ring:
                    rate = self._load(ring, files, feed) / 1e9
        except (LeftOut, PlatformError) as error:
            self.report.left_out("disk to the device", str(error))
            return
        self.report.figure(Row("disk to the device", [rate], "GB/s"))
        self.report.figure(Row("  disk: read alone past the page cache", [alone], "GB/s"))


def _feeds(nbytes: int) -> list[Feed]:
    # None that leaves a reader less than two chunks.
    return [
        feed
        for feed in itertools.starmap(Feed, itertools.product(_CHUNKS, _READERS, _STREAMS))
        if feed.chunk * feed.readers * 2 <= nbytes
    ] or [Feed(max(BLOCK, nbytes // 8), 2, streams) for streams in _STREAMS]
