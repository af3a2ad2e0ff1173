"""The timeline as files: JSON, a Chrome trace, and a waterfall in one HTML page without scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from coldframe.loader.errors import PlatformError
from coldframe.runtime.timeline.stage_groups import group_of
from coldframe.runtime.timeline.svg import STYLE, brief_seconds
from coldframe.runtime.timeline.timeline import Timeline
from coldframe.runtime.timeline.waterfall import legend, waterfall

__all__ = ["chrome_trace", "html_page", "trace_events", "write"]

_THREADS = 10_000
_PAGE = """
body { margin: 2em auto; max-width: 66rem; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 14px/1.5 system-ui, sans-serif; }
.figure { overflow-x: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; }
.legend svg { display: inline; margin-right: .4em; vertical-align: -1px; }
"""


def write(timeline: Timeline, path: str, more: Mapping[str, Any] | None = None) -> None:
    """Writes the timeline to a file: `.html` a page, `.trace.json` a Chrome trace, else JSON.

    Args:
        timeline: What happened.
        path: The file.
        more: What else a JSON document has.

    Raises:
        PlatformError: The file cannot be written.
    """
    if path.endswith((".html", ".htm")):
        text = html_page(timeline)
    elif path.endswith(".trace.json"):
        text = json.dumps(chrome_trace(timeline))
    else:
        text = json.dumps({**timeline.to_json(), **(more or {})}, indent=1)
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise PlatformError(
            "cannot write the timeline",
            where=path,
            got=error.strerror,
            hint="Give --timeline a file in a folder that can be written to.",
        ) from error


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The trace-event format that chrome://tracing and Perfetto read; times in microseconds."""
    return {"traceEvents": trace_events(timeline.to_json()), "displayTimeUnit": "ms"}


def trace_events(
    timeline: Mapping[str, Any], label: str = "", first_pid: int = 1
) -> list[dict[str, Any]]:
    """The events of one start: a process for each of its processes, one for the critical path.

    Processes and threads are numbered on, none twice and none 0, which viewers take for the idle
    task. The first token is an instant on the critical path. Moments are told to the nanosecond.

    Args:
        timeline: As `Timeline.to_json` makes it.
        label: What to call the start before each process's name, where there are several.
        first_pid: The number of its first process; they take `len(processes) + 1`.
    """
    names = sorted({str(span["process"]) for span in timeline["stages"]})
    pids = {name: first_pid + number for number, name in enumerate(names)}
    path_pid = first_pid + len(names)
    lanes: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in names}
    events: list[dict[str, Any]] = []
    for pid, name in [(path_pid, "critical path"), *((pid, name) for name, pid in pids.items())]:
        told = f"{label} {name}".strip()
        order = first_pid if pid == path_pid else pid + 1  # the path is above the others
        events.append(_metadata("process_name", pid, name=told))
        events.append(_metadata("process_sort_index", pid, sort_index=order))
    for span in sorted(timeline["stages"], key=lambda s: (s["start_s"], -s["end_s"])):
        process = str(span["process"])
        lane = _lane(lanes[process], float(span["start_s"]), float(span["end_s"]))
        more = {key: span[key] for key in ("note", "waits_for") if key in span}
        events.append(_complete(span, pids[process], lane) | {"args": more})
    for step in timeline["critical_path"]:
        name = f"{step['process']} {step['name']}".strip()
        events.append(_complete(step, path_pid, 1) | {"name": name})
    if timeline["ttft_s"] is not None:
        moment = {"ph": "i", "s": "p", "name": "first token", "cat": "request"}
        at = {"pid": path_pid, "tid": _THREADS * path_pid + 1, "ts": _us(timeline["ttft_s"])}
        events.append(moment | at)
    rows = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
    for pid, tid in sorted(rows):
        events.append(_metadata("thread_name", pid, name=f"row {tid % _THREADS}") | {"tid": tid})
    return events


def _metadata(kind: str, pid: int, **told: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": _THREADS * pid, "args": told}


def _complete(stretch: Mapping[str, Any], pid: int, lane: int) -> dict[str, Any]:
    start, end = _us(stretch["start_s"]), _us(stretch["end_s"])
    return {
        "ph": "X",
        "name": str(stretch["name"]),
        "cat": group_of(str(stretch["name"]), str(stretch["process"])),
        "pid": pid,
        "tid": _THREADS * pid + lane,
        "ts": start,
        "dur": round(end - start, 3),
    }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _lane(lanes: list[list[tuple[float, float]]], start: float, end: float) -> int:
    """A row of its process where a span lies apart from each other one, or inside it.

    In one row of a trace neighbours must nest; a process's threads do not keep to that.

    Args:
        lanes: What is open or last in each row so far, outermost first, in the order of their
            starts; the span is added.
        start: The next span's.
        end: The next span's.
    """
    for number, lane in enumerate(lanes):
        while lane and lane[-1][1] <= start:
            lane.pop()
        if not lane or lane[-1][1] >= end:
            lane.append((start, end))
            return number + 1
    lanes.append([(start, end)])
    return len(lanes)


def html_page(timeline: Timeline) -> str:
    """A page with the waterfall as an inline picture; it needs nothing from elsewhere."""
    drawn = waterfall(timeline.to_json(), "start", "Waterfall of a cold start")
    ttft = timeline.first_token_ns
    after = "no first token" if ttft is None else brief_seconds(timeline.seconds(ttft))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"'
        ' content="width=device-width, initial-scale=1"><title>coldframe: cold start</title>'
        f"<style>{STYLE}{_PAGE}</style><h1>Cold start: {after}</h1>"
        "<p>Above, the critical path: what the first token was waiting for. Below, what each"
        " process did; a dark line under a bar is where the path went through it. Point at a bar"
        " for its times.</p>"
        f'{legend()}<div class="figure" tabindex="0">{drawn}</div></html>'
    )
