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
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from coldframe.benchmarks.gpu.bare import Bare, bare, fill, fitting, host_buffer
from coldframe.benchmarks.gpu.copies import HOST_COPY
from coldframe.benchmarks.gpu.feeding import ConnectedRing, Feed, MemorySource, load, read_alone
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row, evict_files, warm_page_cache
from coldframe.loader.checkpoint import Checkpoint
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import DeviceError, PlatformError
from coldframe.loader.plan import Layout, Plan
from coldframe.loader.sources.base import Source
from coldframe.loader.sources.direct import BLOCK
from coldframe.loader.sources.file import FileSource

__all__ = ["PINNED", "measure", "rates_of"]

PINNED = "weights in pinned RAM to the device"

_CHUNKS = (8 << 20, 16 << 20)
_READERS = (2, 4, 6, 8)
_STREAMS = (1, 2)
_DISK_READERS = 8
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
                _from(report, setting, "host RAM", _memory(link), plan, arena, link)
                files = FileSource(checkpoint.shards)
                try:
                    warm_page_cache(model)
                    _from(report, setting, "page cache", files, plan, arena, link)
                finally:
                    files.close()
                _from_pinned(report, setting, plan, arena, link)
                _from_disk(report, checkpoint, model, plan, arena, context, most)
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
    for feed in _feeds(link.nbytes):
        with ConnectedRing(feed, link.context) as ring:
            # The first load of a ring locks its buffers.
            load(ring, source, plan, arena.address, feed, link.nbytes // 4)
            tried[feed] = load(ring, source, plan, arena.address, feed, link.nbytes)
    feed = max(tried, key=lambda feed: tried[feed])
    rates = {str(feed): f"{rate / 1e9:.1f} GB/s" for feed, rate in tried.items()}
    report.answer(f"{what}: the fastest feed", {"best": str(feed), **rates})
    ours, theirs, alone = [], [], []
    with ConnectedRing(feed, link.context) as ring:
        load(ring, source, plan, arena.address, feed, link.nbytes)
        for _ in range(setting.runs):
            theirs.append(link.rate(1) / 1e9)
            ours.append(load(ring, source, plan, arena.address, feed, link.nbytes) / 1e9)
            alone.append(read_alone(source, plan, feed, link.nbytes) / 1e9)
        note = ring.note
    name = f"{what} to the device"
    report.answer(f"{what}: how it was copied", note)
    report.figure(Row(name, ours, "GB/s"))
    report.figure(Row(f"  {what}: read alone, by as many readers", alone, "GB/s"))
    pairs = list(zip(ours, theirs, strict=True))
    report.figure(Row(f"{name} / bare pinned copy", [a / b for a, b in pairs], "ratio"))
    if what != "page cache":
        return
    limit = "page cache / the lesser of 0.8 x bare and the host's own copies"
    try:
        host = report.earlier.median(HOST_COPY)
    except LeftOut as error:
        report.left_out(limit, str(error))
        return
    bounds = [a / min(_PAGE_CACHE * b, host) for a, b in pairs]
    report.figure(Row(limit, bounds, "ratio", 1.0, at_least=True))


def _feeds(nbytes: int) -> list[Feed]:
    # Not one that leaves each reader less than two chunks.
    return [
        feed
        for feed in itertools.starmap(Feed, itertools.product(_CHUNKS, _READERS, _STREAMS))
        if feed.chunk * feed.readers * 2 <= nbytes
    ] or [Feed(max(BLOCK, nbytes // 8), 2, streams) for streams in _STREAMS]


def _from_pinned(
    report: Report, setting: Setting, plan: Plan, arena: DeviceArena, link: Bare
) -> None:
    """All weights out of locked host memory, as they come back to a replica that was parked."""
    if find_spec("coldframe.loader.devices.pinned") is None:
        report.left_out(PINNED, "there is no such tier yet")
        return
    pinned: Any = import_module("coldframe.loader.devices.pinned")
    parked: Any = import_module("coldframe.loader.devices.parked")
    rates: list[float] = []
    ratios: list[float] = []
    weights = pinned.PinnedWeights(arena, parked.stretches_of(plan))
    try:
        started = time.perf_counter()
        weights.keep(lambda: None)
        kept_s = time.perf_counter() - started
        for _ in range(setting.runs):
            bare_rate = link.rate(1)
            started = time.perf_counter()
            weights.bring(lambda stage: None, lambda: None)
            rate = plan.weights_bytes / (time.perf_counter() - started)
            rates.append(rate / 1e9)
            ratios.append(rate / bare_rate)
    except DeviceError as error:
        report.left_out(PINNED, str(error))
        return
    finally:
        weights.close()
    report.figure(Row("  kept there for the first time", [kept_s], "s"))
    report.figure(Row(PINNED, rates, "GB/s"))
    report.figure(Row(f"{PINNED} / bare pinned copy", ratios, "ratio", _PINNED, at_least=True))


def _from_disk(
    report: Report,
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
        feed = Feed(max(BLOCK, min(8 << 20, most // 8)), _DISK_READERS, 1)
        alone = read_alone(files, plan, feed, most) / 1e9
        with ConnectedRing(feed, context) as ring:
            rate = load(ring, files, plan, arena.address, feed, most) / 1e9
    except (LeftOut, PlatformError) as error:
        report.left_out("disk to the device", str(error))
        return
    finally:
        files.close()
    report.figure(Row("disk, read alone past the page cache", [alone], "GB/s"))
    report.figure(Row("disk to the device", [rate], "GB/s"))
