"""Captured steps of one start, put together by the next one from what it has kept of them.

The first was the one that decoded: it has captured all its steps, and written them to a store. This
is the second. What it takes to put them together is held against what their capture took.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from coldframe.benchmarks.gpu.decode import CAPTURE_S, STORE
from coldframe.benchmarks.gpu.model import MODEL
from coldframe.benchmarks.gpu.replicas import ask, options
from coldframe.benchmarks.gpu.report import LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row
from coldframe.loader.timeline import Span
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.replica.replica import Replica

__all__ = ["measure", "restored", "row"]

_SHARE = 0.2
_TOKENS = 130
_WAIT_S = 10.0
_NOTE = re.compile(r"(\d+) steps in ([\d.]+) ms")


def measure(report: Report, setting: Setting) -> None:
    """Starts a replica that finds them.

    Raises:
        LeftOut: There are none, or it could not have them back; it says why.
    """
    snapshot = SnapshotOptions("auto", report.earlier.need(STORE), create=False)
    told = options(report.earlier.need(MODEL), setting.device, snapshot=snapshot)
    with Replica(told) as replica:
        ask(replica, _TOKENS).wait(replica, setting.seconds)
        deadline = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline and not _told(replica.spans):
            replica.poll(0.05)
        notes = _told(replica.spans)
    report.answer("what the worker says of them", notes or "nothing")
    steps, seconds = restored(notes)
    report.figure(Row("steps put together from an archive", [seconds * 1e3], "ms"))
    report.answer("steps", steps)
    report.figure(row(steps, seconds, report.earlier.median(CAPTURE_S) / 1e3))


def row(steps: int, seconds: float, capture_s: float) -> Row:
    """The figure with the aim.

    Args:
        steps: How many were put together.
        seconds: What that took.
        capture_s: The median of a capture.
    """
    return Row("archive / capture of as many", [seconds / (steps * capture_s)], "ratio", _SHARE)


def restored(notes: Sequence[str]) -> tuple[int, float]:
    """How many steps a worker has had back, and in how many seconds, by what its spans say.

    Raises:
        LeftOut: None.
    """
    for note in notes:
        said = _NOTE.match(note)
        if said is not None and int(said[1]):
            return int(said[1]), float(said[2]) / 1e3
    raise LeftOut(f"no step was put together: {notes[0] if notes else 'nobody says why'}")


def _told(spans: Sequence[Span]) -> list[str]:
    return [span.note or "" for span in spans if span.name == "graph_restore"]
