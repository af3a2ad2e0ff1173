"""The timeline as files: JSON, a Chrome trace, and a waterfall in one HTML page without scripts."""

from __future__ import annotations

import html
import json
from typing import Any

from coldframe.loader.errors import PlatformError
from coldframe.loader.timeline import Span
from coldframe.runtime.timeline import UNATTRIBUTED, Timeline
from coldframe.runtime.units import human_seconds

__all__ = ["chrome_trace", "html_page", "write"]

_ROW = 18
_LEFT = 220
_WIDTH = 900
# Okabe and Ito's colours, told apart by nearly everybody.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def write(timeline: Timeline, path: str) -> None:
    """Writes the timeline to a file: `.html` a page, `.trace.json` a Chrome trace, else JSON.

    Raises:
        PlatformError: The file cannot be written.
    """
    if path.endswith((".html", ".htm")):
        text = html_page(timeline)
    elif path.endswith(".trace.json"):
        text = json.dumps(chrome_trace(timeline))
    else:
        text = json.dumps(timeline.to_json(), indent=1)
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
    processes = sorted({span.process for span in timeline.spans})
    events: list[dict[str, Any]] = []
    lanes: dict[str, list[list[Span]]] = {process: [] for process in processes}
    for number, process in enumerate([*processes, "critical path"]):
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": process}})
    for span in timeline.spans:
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "tid": _lane(lanes[span.process], span),
                "pid": processes.index(span.process),
                "ts": (span.start_ns - timeline.exec_ns) / 1e3,
                "dur": (span.end_ns - span.start_ns) / 1e3,
                "args": {"note": span.note, "waits_for": span.waits_for},
            }
        )
    for step in timeline.critical_path():
        events.append(
            {
                "ph": "X",
                "name": f"{step.process} {step.name}".strip(),
                "tid": 1,
                "pid": len(processes),
                "ts": (step.start_ns - timeline.exec_ns) / 1e3,
                "dur": (step.end_ns - step.start_ns) / 1e3,
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _lane(lanes: list[list[Span]], span: Span) -> int:
    """A row of its process where the span lies apart from each other one, or inside it.

    In one row of a trace neighbours must nest; a process's threads do not keep to that.

    Args:
        lanes: The spans of each row so far, in the order of their starts; the span is added.
        span: The next one.
    """
    for number, lane in enumerate(lanes):
        if all(s.end_ns <= span.start_ns or s.end_ns >= span.end_ns for s in lane):
            lane.append(span)
            return number + 1
    lanes.append([span])
    return len(lanes)


def html_page(timeline: Timeline) -> str:
    """A page with the waterfall as an inline picture; it needs nothing from elsewhere."""
    ends = [span.end_ns for span in timeline.spans]
    total = max([*ends, timeline.first_token_ns or 0, timeline.exec_ns + 1]) - timeline.exec_ns
    processes = list(dict.fromkeys(span.process for span in timeline.spans))
    rows: list[str] = []
    y = _ROW

    def bar(label: str, start: int, end: int, colour: str, faint: bool) -> None:
        nonlocal y
        x = _LEFT + _WIDTH * (start - timeline.exec_ns) / total
        width = max(1.0, _WIDTH * (end - start) / total)
        tip = f"{label}: {human_seconds((end - start) / 1e9)}"
        tip += f" from {human_seconds(timeline.seconds(start))}"
        rows.append(
            f'<g><title>{html.escape(tip)}</title><text x="{_LEFT - 8}" y="{y + 12}"'
            f' text-anchor="end">{html.escape(label)}</text>'
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 4}" rx="2"'
            f' fill="{colour}" opacity="{0.25 if faint else 1}"/></g>'
        )
        y += _ROW

    for step in timeline.critical_path():
        colour = "#999999" if step.name == UNATTRIBUTED else "#333333"
        label = f"{step.process} {step.name}".strip()
        bar(label, step.start_ns, step.end_ns, colour, False)
    y += _ROW
    for number, process in enumerate(processes):
        for span in (s for s in timeline.spans if s.process == process):
            colour = _COLOURS[number % len(_COLOURS)]
            label = f"{process} {span.name}"
            bar(label, span.start_ns, span.end_ns, colour, span.waits_for is not None)
    marker = ""
    if timeline.first_token_ns is not None:
        x = _LEFT + _WIDTH * (timeline.first_token_ns - timeline.exec_ns) / total
        ttft = human_seconds(timeline.seconds(timeline.first_token_ns))
        marker = (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y}" stroke="#D55E00"/>'
            f'<text x="{x - 4:.1f}" y="12" text-anchor="end" fill="#D55E00">'
            f"first token, {ttft}</text>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>coldframe: cold start'
        "</title><style>body{font:13px system-ui,sans-serif;margin:2em}"
        "text{font-size:11px}</style><h1>Cold start</h1>"
        "<p>Above, in grey, the critical path: what the first token was waiting for. Below, what"
        " each process did; pale bars are waits. Point at a bar for its times.</p>"
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + 20} {y + _ROW}" role="img"'
        f' aria-label="waterfall of a cold start">{"".join(rows)}{marker}</svg></html>'
    )
