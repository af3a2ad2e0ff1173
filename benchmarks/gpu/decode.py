"""Decode against the device's own memory: each step reads all weights once, however many it is for.

Eager, that is with each kernel asked for, and with captured steps, in turn: a replica of each. What
is captured, and how long that takes, is told by the spans of the one that captures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.replicas import Answer, ask, options
from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.timeline import Span
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.replica.replica import Replica

__all__ = ["CAPTURE_S", "STORE", "bandwidth", "captures", "measure", "together_rate"]

CAPTURE_S = "  capture of a step"
STORE = "where captured steps are kept"

_TOKENS = 130
_BATCHES = (1, 8, 32)
_SHARES = {False: 0.3, True: 0.65}
"""Of the bandwidth, eager and with captured steps, at batch 1."""
_COPIES = 10
_FIRST_S = 3.0
_ALL_S = 20.0
"""How long a replica that nobody asks may capture steps, in seconds."""


def measure(report: Report, setting: Setting) -> None:
    """Measures the device's memory, then decodes."""
    model = report.earlier.need(MODEL)
    context = Context(Driver.open(), setting.ordinal)
    try:
        rates = bandwidth(context, setting.nbytes)
    finally:
        context.close()
    report.figure(Row("device memory, a copy counted twice", [r / 1e9 for r in rates], "GB/s"))
    store = str(Path(setting.scratch, "steps"))
    for graphs in (True, False):
        snapshot = SnapshotOptions("auto" if graphs else "off", store, create=graphs)
        told = options(model, setting.device, graphs=graphs, snapshot=snapshot)
        with Replica(told) as replica:
            # So many tokens that their steps are captured.
            ask(replica, _TOKENS).wait(replica, setting.seconds)
            if graphs and not _has_captured(replica, report):
                continue
            limit = median(rates) / int(replica.facts["weights_bytes"])
            report.figure(Row("  bandwidth / bytes of weights", [limit], "tokens/s"))
            _rates(report, setting, replica, limit, graphs=graphs)
            if graphs:
                _tell_captures(report, replica)
                report.keep(STORE, store)


def _rates(
    report: Report, setting: Setting, replica: Replica, limit: float, *, graphs: bool
) -> None:
    """All batches, the single one first and again after each run: what there is when time is up."""
    how = "with captured steps" if graphs else "eager"
    shift = 1
    for batch in _BATCHES:
        rates: list[float] = []
        # The first of a larger one is what its steps are captured for.
        for number in range(min(setting.runs, 5 if graphs else 3) if batch == 1 else 2):
            answers = [ask(replica, _TOKENS, shift=shift + one) for one in range(batch)]
            shift += batch
            for answer in answers:
                answer.wait(replica, setting.seconds)
            if batch > 1 and number == 0:
                continue
            rates.append(answers[0].rate if batch == 1 else together_rate(answers))
            name = f"decode, batch {batch}, {how}"
            report.figure(Row(name, rates, "tokens/s"))
            if batch == 1:
                shares = [rate / limit for rate in rates]
                share = f"{name} / bandwidth's"
                report.figure(Row(share, shares, "ratio", _SHARES[graphs], at_least=True))


def together_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of answers that are made together, while none of them is missing.

    Raises:
        LeftOut: They never were.
    """
    begin = max(answer.times[1] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    tokens = sum(begin < at <= end for answer in answers for at in answer.times)
    if end <= begin or not tokens:
        raise LeftOut(f"{len(answers)} answers were never made at one time")
    return tokens / (end - begin)


def _has_captured(replica: Replica, report: Report) -> bool:
    """Whether a replica that has made an answer captures the steps of the next one."""
    deadline = time.monotonic() + _FIRST_S
    while not (told := captures(replica.spans))[0] and time.monotonic() < deadline:
        replica.poll(0.05)
    if not told[0]:
        report.left_out("decode with captured steps", (*told[1], "none was captured")[0])
    return bool(told[0])


def captures(spans: Sequence[Span]) -> tuple[list[float], list[str]]:
    """The seconds that each capture took, and what failed of those that did."""
    found = [span for span in spans if span.name == "graph_capture"]
    failed = [span.note or "" for span in found if " failed: " in (span.note or "")]
    done = [span for span in found if " failed: " not in (span.note or "")]
    return [(span.end_ns - span.start_ns) / 1e9 for span in done], failed


def _tell_captures(report: Report, replica: Replica) -> None:
    """What was captured, once all is: nobody asks meanwhile."""
    deadline = time.monotonic() + _ALL_S
    saved: list[str] = []
    while not saved and time.monotonic() < deadline:
        replica.poll(0.05)
        saved = [span.note or "" for span in replica.spans if span.name == "graph_save"]
    done, failed = captures(replica.spans)
    report.figure(Row(CAPTURE_S, [seconds * 1e3 for seconds in done], "ms"))
    report.figure(Row("  all captures together", [sum(done)], "s"))
    report.answer("steps captured", len(done))
    report.answer("kept for the next start", saved[0] if saved else "not within the time")
    for note in failed:
        report.left_out("a captured step", note)


def bandwidth(context: Context, nbytes: int) -> list[float]:
    """Bytes per second that the device's memory reads and writes, by copies of it.

    Args:
        context: The device.
        nbytes: Of one copy; less where there is no room for two times that.
    """
    driver, unit = context.driver, context.granularity
    nbytes = max(unit, min(nbytes, context.available() // 4) // unit * unit)
    memory = DeviceReservation(context, 2 * nbytes)
    try:
        got = driver.create(context.ordinal, 2 * nbytes, shareable=False)
        memory.map(0, 2 * nbytes, got, writable=True)
        driver.release(got)
        stream = driver.stream()
        driver.fill_zeros(memory.address, 2 * nbytes, stream)
        driver.synchronize(stream)
        found = []
        for _ in range(_COPIES):
            started = time.perf_counter()
            driver.copy_across(memory.address, memory.address + nbytes, nbytes, stream)
            driver.synchronize(stream)
            found.append(2 * nbytes / (time.perf_counter() - started))
        driver.destroy_stream(stream)
        return found[1:]
    finally:
        memory.close()
