"""The rates of the path, each alone: the link, the host's memory, locking it.

Nothing of the loader is in here. What the loader reaches is held against these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Any

from coldframe.benchmarks.gpu.bare import Bare, bare, fill, fitting, host_buffer, move
from coldframe.benchmarks.gpu.report import Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.loader.arena import HUGE_PAGE
from coldframe.loader.cgroup import cpu_count
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import DeviceError

__all__ = ["BARE", "HOST_COPY", "measure", "rates_of"]

BARE = "bare pinned copy to the device"
HOST_COPY = "host memory to host memory, the best"
_RING_BUFFER = 8 << 20
_THREADS = (1, 2, 4, 6, 8)


def measure(report: Report, setting: Setting) -> None:
    """Measures what hardware, kernel and driver can do by themselves."""
    rates_of(report, setting, None)


def rates_of(report: Report, setting: Setting, api: Any) -> None:
    """See `measure`.

    Args:
        report: Where it goes.
        setting: How much and how often.
        api: The driver's calls; None takes the bindings.
    """
    context = Context(Driver.open(api), setting.ordinal)
    try:
        setting = replace(setting, nbytes=fitting(setting.nbytes, context))
        _locking(report, setting, context)
        with bare(context, setting.nbytes) as link:
            _link(report, setting, link)
            _unlocked(report, setting, link)
        _host(report, setting)
    finally:
        context.close()


def _link(report: Report, setting: Setting, link: Bare) -> None:
    link.rate()
    link.check()
    one = [link.rate(1) / 1e9 for _ in range(setting.runs)]
    two = [link.rate(2) / 1e9 for _ in range(setting.runs)]
    report.figure(Row(BARE, one if median(one) >= median(two) else two, "GB/s"))
    report.figure(Row("  on one stream", one, "GB/s"))
    report.figure(Row("  on two streams", two, "GB/s"))
    back = [link.out_rate() / 1e9 for _ in range(setting.runs)]
    report.figure(Row("bare pinned copy to the host", back, "GB/s"))


def _unlocked(report: Report, setting: Setting, link: Bare) -> None:
    """From memory that is not locked: what a ring is left with where the kernel locks none."""
    driver, nbytes = link.context.driver, max(1, setting.nbytes // 8)
    buffer = host_buffer(nbytes)
    fill(buffer)

    def copy() -> None:
        driver.copy_in(link.arena.address, buffer.address, nbytes, link.streams[0])
        driver.synchronize(link.streams[0])

    rates = [nbytes / 1e9 / _seconds(copy) for _ in range(setting.runs)]
    report.figure(Row("copy to the device from memory that is not locked", rates, "GB/s"))


def _locking(report: Report, setting: Setting, context: Context) -> None:
    """What `cuMemHostRegister` takes: of a ring's buffer, and of a large piece."""
    piece = max(HUGE_PAGE, setting.nbytes // 4)
    try:
        for name, touched in (("that nobody has touched", False), ("that is full", True)):
            seconds = [_lock_s(context, _RING_BUFFER, touched) for _ in range(setting.runs)]
            runs = [value * 1e3 for value in seconds]
            report.figure(Row(f"locking a buffer of 8 MiB {name}", runs, "ms"))
        seconds = [_lock_s(context, piece, True) for _ in range(setting.runs)]
        rates = [piece / 1e9 / value for value in seconds]
        report.figure(Row(f"locking {piece >> 20} MiB that are full", rates, "GB/s"))
    except DeviceError as error:
        report.left_out("locking host memory", str(error))


def _lock_s(context: Context, nbytes: int, touched: bool) -> float:
    buffer = host_buffer(nbytes)
    if touched:
        fill(buffer)
    seconds = _seconds(lambda: context.driver.register_host(buffer.address, nbytes))
    context.driver.unregister_host(buffer.address)
    return seconds


def _host(report: Report, setting: Setting) -> None:
    """The host's memory copied to itself, by some threads: no reader can be faster than that."""
    nbytes = setting.nbytes // 2
    source, target = host_buffer(nbytes), host_buffer(nbytes)
    fill(source)
    fill(target)
    what, best = "host memory to host memory", list[float]()
    for threads in _THREADS:
        if threads > max(1, cpu_count()):
            report.left_out(f"{what}, {threads} threads or more", f"{cpu_count()} processors")
            break
        rates = _host_rates(source.address, target.address, nbytes, threads, setting.runs)
        report.figure(Row(f"{what}, {threads} threads", rates, "GB/s"))
        if not best or median(rates) > median(best):
            best = rates
    report.figure(Row(HOST_COPY, best, "GB/s"))


def _host_rates(source: int, target: int, nbytes: int, threads: int, runs: int) -> list[float]:
    piece = -(-nbytes // threads)

    def part(number: int) -> None:
        begin = number * piece
        move(target + begin, source + begin, min(piece, nbytes - begin))

    with ThreadPoolExecutor(threads) as pool:
        return [
            nbytes / 1e9 / _seconds(lambda: list(pool.map(part, range(threads))))
            for _ in range(runs)
        ]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
