"""Runs as one Chrome trace, for Perfetto (https://ui.perfetto.dev) and chrome://tracing.

Each process of each run is a process of the trace, and each run's critical path is one above them.
All runs begin at 0, so that they lie under each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coldframe.benchmarks.report.runs import Run
from coldframe.runtime.timeline.export import trace_events

__all__ = ["chrome_trace"]


def chrome_trace(runs: Sequence[Run]) -> dict[str, Any]:
    """The trace-event format; times in microseconds from each run's exec on."""
    events: list[dict[str, Any]] = []
    pid = 1
    for run in runs:
        made = trace_events(run.timeline, run.label, pid)
        pid = max(event["pid"] for event in made) + 1
        events.extend(made)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
