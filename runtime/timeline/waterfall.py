"""A start's waterfall as an inline picture: what each process did, and what the token waited for.

It is drawn from the timeline's JSON (`Timeline.to_json`), so that a document that has been kept
is drawn as well as a start that has just been. Each process is a band with a row for each of its
stages; what it waited for is pale, in a row of its own. Above all is the critical path, and under
each bar a dark line for as long as the path went through it.

Of a start with very many spans neighbours of one stage that lie close are drawn as one bar, and a
process's lesser stages share a row; the picture's description says so.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coldframe.runtime.timeline.stage_groups import GROUPS, group_of, stage_of
from coldframe.runtime.timeline.svg import (
    Axis,
    brief_seconds,
    element,
    fitted,
    picture,
    seconds_ticks,
    text,
    width_of,
)

__all__ = ["Row", "legend", "rows_of", "waterfall"]

WIDTH = 1000
_LEFT = 224
_PROCESS = 92
_RIGHT = 68
_ROW = 15
_BAR = 10
_STRIP = 18
_TOP = 22
_BARS = 700
_ROWS = 14
_WAITING = "waiting"
_MERGE_PX = 0.5


@dataclass(slots=True)
class Row:
    """The spans of one stage of a process, `prefill[0]` and `prefill[1]` alike.

    Args:
        process: Whose.
        stage: Its name, or `waiting` for all that the process waited for.
        spans: As in the timeline's JSON, in the order of their starts.
    """

    process: str
    stage: str
    spans: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def start_s(self) -> float:
        return float(self.spans[0]["start_s"])

    @property
    def end_s(self) -> float:
        return max(float(span["end_s"]) for span in self.spans)

    @property
    def busy_s(self) -> float:
        return sum(float(span["end_s"]) - float(span["start_s"]) for span in self.spans)

    @property
    def group(self) -> str:
        return group_of(str(self.spans[0]["name"]), self.process)

    @property
    def label(self) -> str:
        return self.stage if len(self.spans) == 1 else f"{self.stage} x{len(self.spans)}"


def rows_of(timeline: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The rows of each process, both in the order of their starts.

    Args:
        timeline: As `Timeline.to_json` makes it.
    """
    rows: dict[tuple[str, str], Row] = {}
    for span in sorted(timeline["stages"], key=lambda s: (s["start_s"], s["end_s"])):
        process = str(span["process"])
        stage = _WAITING if "waits_for" in span else stage_of(str(span["name"]))
        rows.setdefault((process, stage), Row(process, stage)).spans.append(span)
    bands: dict[str, list[Row]] = {}
    for row in rows.values():
        bands.setdefault(row.process, []).append(row)
    return {process: _folded(process, band) for process, band in bands.items()}


def _folded(process: str, band: list[Row]) -> list[Row]:
    """At most so many rows: the stages that took least share one."""
    if len(band) <= _ROWS:
        return band
    ranked = sorted(band, key=lambda row: -row.busy_s)
    kept, rest = ranked[: _ROWS - 1], ranked[_ROWS - 1 :]
    spans = sorted((s for row in rest for s in row.spans), key=lambda s: float(s["start_s"]))
    other = Row(process, f"{len(rest)} lesser stages", spans)
    return [row for row in band if row in kept] + [other]


def waterfall(
    timeline: Mapping[str, Any], ident: str, title: str, client_s: float | None = None
) -> str:
    """The picture, as SVG markup.

    Args:
        timeline: As `Timeline.to_json` makes it.
        ident: An id that is unique within the page.
        title: Whose start it is.
        client_s: When a client had its first token, in seconds from the exec on. That is not the
            replica's own, which it may have made before anybody could ask; None where no client
            has said.
    """
    bands = rows_of(timeline)
    ttft = timeline["ttft_s"]
    first = max(float(ttft or 0), client_s or 0.0)
    last = max([float(s["end_s"]) for s in timeline["stages"]] + [first, 1e-6])
    # What goes on long behind the first token would press all that was before it together.
    shown = 1.5 * first if ttft and last > 2 * first else last
    axis = Axis(0.0, shown, _LEFT, WIDTH - _RIGHT)
    gap = _MERGE_PX if len(timeline["stages"]) > _BARS else -1.0
    bars = {id(row): _merged(row.spans, axis, gap) for band in bands.values() for row in band}
    while gap > 0 and sum(map(len, bars.values())) > _BARS and gap < WIDTH:
        gap *= 2
        bars = {id(row): _merged(row.spans, axis, gap) for band in bands.values() for row in band}

    path = timeline["critical_path"]
    y = float(_TOP)
    drawn = []
    if path:
        drawn.append(text(_LEFT - 10, y + 13, "critical path", "end strong"))
        drawn.extend(_strip(path, axis, y))
        y += _STRIP + 8
    for process, band in bands.items():
        drawn.append(element("line", x1=0, x2=WIDTH, y1=y + 1, y2=y + 1, class_="grid"))
        drawn.append(text(4, y + 14, fitted(process, _PROCESS), "strong", title=process))
        y += 4
        for row in band:
            drawn.extend(_row(row, bars[id(row)], path, axis, y))
            y += _ROW
        y += 4
    bottom = y + 4
    grid = _axis(axis, _TOP + (_STRIP + 4 if path else 0), bottom)
    line, label = ("", "") if ttft is None else _first_token(float(ttft), axis, bottom)
    desc = _description(timeline, sum(map(len, bars.values())), shown, last)
    if client_s is not None:
        desc += f" The client had it after {brief_seconds(client_s)}."
        client, told = _client(client_s, ttft, axis, bottom)
        line, label = line + client, label + told
    content = "".join([*grid, line, *drawn, label])
    return picture(ident, title, desc, WIDTH, bottom + 20, content)


def _strip(path: Sequence[Mapping[str, Any]], axis: Axis, y: float) -> list[str]:
    drawn = []
    for step in path:
        start, end = float(step["start_s"]), float(step["end_s"])
        left, right = axis.at(start), axis.at(end)
        group = group_of(str(step["name"]), str(step["process"]))
        label = f"{step['process']} {step['name']}".strip()
        drawn.append(
            element(
                "rect",
                f"<title>{html.escape(_told(label, start, end))}</title>",
                x=left,
                y=y,
                width=max(0.2, right - left),
                height=float(_STRIP),
                class_=f"step g-{group}",
                data_name=step["name"],
                data_process=step["process"],
                data_start=start,
                data_end=end,
            )
        )
    for group, start, end in _runs(path):
        left, right = axis.at(start), axis.at(end)
        edge = element("rect", x=right - 0.5, y=y, width=1.0, height=18.0, fill="var(--bar)")
        drawn.append(edge)
        if width_of(group) <= right - left - 6:
            drawn.append(text((left + right) / 2, y + 13, group, f"middle in in-{group}"))
    return drawn


def _runs(path: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Neighbours of one group, which share a label."""
    runs: list[tuple[str, float, float]] = []
    for step in path:
        group = group_of(str(step["name"]), str(step["process"]))
        start = runs.pop()[1] if runs and runs[-1][0] == group else float(step["start_s"])
        runs.append((group, start, float(step["end_s"])))
    return runs


def _merged(
    spans: Sequence[Mapping[str, Any]], axis: Axis, gap: float
) -> list[list[Mapping[str, Any]]]:
    """The spans of each bar: those nearer to each other than so many pixels share one."""
    bars: list[list[Mapping[str, Any]]] = []
    reached = 0.0
    for span in spans:
        if gap >= 0 and bars and axis.at(float(span["start_s"])) - reached < gap:
            bars[-1].append(span)
        else:
            bars.append([span])
            reached = 0.0
        reached = max(reached, axis.at(float(span["end_s"])))
    return bars


def _row(
    row: Row,
    bars: Sequence[Sequence[Mapping[str, Any]]],
    path: Sequence[Mapping[str, Any]],
    axis: Axis,
    y: float,
) -> list[str]:
    """A row's label, its bars, what of them is on the path, and how long it was busy."""
    told = f"{row.process} {row.label}: {brief_seconds(row.busy_s)}"
    drawn = [text(_LEFT - 10, y + 10, fitted(row.label, _LEFT - _PROCESS - 16), "end", title=told)]
    for spans in bars:
        first = spans[0]
        start, end = float(first["start_s"]), max(float(s["end_s"]) for s in spans)
        left, right = axis.at(start), axis.at(end)
        group = group_of(str(first["name"]), row.process)
        waits = " wait" if row.stage == _WAITING else ""
        drawn.append(
            element(
                "rect",
                f"<title>{html.escape(_tip(row.process, spans, start, end))}</title>",
                x=left,
                y=y + 1,
                width=max(1.0, right - left),
                height=float(_BAR),
                class_=f"bar g-{group}{waits}",
                data_name=first["name"],
                data_process=row.process,
                data_start=start,
                data_end=end,
                data_count=len(spans) if len(spans) > 1 else None,
            )
        )
    names = {str(span["name"]) for span in row.spans if "waits_for" not in span}
    for step in path:
        if step["process"] == row.process and step["name"] in names:
            left, right = axis.at(float(step["start_s"])), axis.at(float(step["end_s"]))
            drawn.append(
                element("rect", x=left, y=y + 11, width=right - left, height=2.0, class_="on")
            )
    right = axis.at(row.end_s)
    length = brief_seconds(row.busy_s)
    if right + 6 + width_of(length) <= WIDTH:
        drawn.append(text(right + 5, y + 10, length, "faint halo"))
    return drawn


def _tip(process: str, spans: Sequence[Mapping[str, Any]], start: float, end: float) -> str:
    first = spans[0]
    if len(spans) > 1:
        return _told(f"{process} {stage_of(str(first['name']))} x{len(spans)}", start, end)
    said = _told(f"{process} {first['name']}", start, end)
    if "waits_for" in first:
        said += f", waiting for {first['waits_for']}"
    return said + (f"; {first['note']}" if "note" in first else "")


def _told(label: str, start: float, end: float) -> str:
    return f"{label}: {brief_seconds(end - start)} from {brief_seconds(start)}"


def _axis(axis: Axis, top: float, bottom: float) -> list[str]:
    drawn = []
    ticks = axis.ticks()
    for tick, label in zip(ticks, seconds_ticks(ticks), strict=True):
        x = axis.at(tick)
        drawn.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        drawn.append(text(x, bottom + 14, label, "middle faint"))
    drawn.append(text(_LEFT - 10, bottom + 14, "since the exec", "end faint"))
    return drawn


def _first_token(ttft: float, axis: Axis, bottom: float) -> tuple[str, str]:
    x = axis.at(ttft)
    label = f"first token {brief_seconds(ttft)}"
    before = x - width_of(label) > _LEFT
    line = element("line", x1=x, x2=x, y1=5.0, y2=bottom, class_="first", data_ttft=ttft)
    style = "first-text end" if before else "first-text"
    return line, text(x - 5 if before else x + 5, 14, label, style)


def _client(client_s: float, ttft: float | None, axis: Axis, bottom: float) -> tuple[str, str]:
    """The client's mark, and what it says where that does not lie on the other mark's words."""
    x = axis.at(client_s)
    line = element("line", x1=x, x2=x, y1=5.0, y2=bottom, class_="client", data_client=client_s)
    label = f"client {brief_seconds(client_s)}"
    width = width_of(label) + 10
    first = _LEFT if ttft is None else axis.at(float(ttft))
    other_is_before = ttft is None or first - width_of(f"first token {brief_seconds(ttft)}") > _LEFT
    if x >= first and other_is_before and x + width < WIDTH:
        return line, text(x + 5, 14, label, "first-text")
    if x - first > width and other_is_before:
        return line, text(x - 5, 14, label, "first-text end")
    return line, ""


def _description(timeline: Mapping[str, Any], bars: int, shown: float, last: float) -> str:
    spans = len(timeline["stages"])
    ttft = timeline["ttft_s"]
    said = f"{spans} stages of {len({s['process'] for s in timeline['stages']})} processes. "
    if ttft is None:
        said += "There was no first token."
    else:
        said += f"The first token was out after {brief_seconds(ttft)}, of which"
        said += f" {brief_seconds(timeline['unattributed_s'])} are unattributed."
    if bars < spans:
        said += f" Those close to each other are drawn together, as {bars} bars."
    if shown < last:
        said += f" The picture ends at {brief_seconds(shown)}; what goes on until"
        said += f" {brief_seconds(last)} is cut there."
    return said


def legend(*, client: bool = False) -> str:
    """What the colours mean, as HTML.

    Args:
        client: Whether there are marks of clients, too.
    """
    keys = [
        f'<li><svg width="12" height="12" aria-hidden="true"><rect width="12" height="12"'
        f' rx="2" class="g-{group}"/></svg>{html.escape(told)}</li>'
        for group, told in GROUPS.items()
    ]
    keys.append(
        '<li><svg width="12" height="12" aria-hidden="true"><rect width="12" height="12"'
        ' rx="2" class="g-weights wait"/></svg>pale: waiting</li>'
    )
    keys.append(
        '<li><svg width="12" height="12" aria-hidden="true"><rect y="5" width="12"'
        ' height="2" class="on"/></svg>on the critical path</li>'
    )
    if client:
        keys.append(
            '<li><svg width="12" height="12" aria-hidden="true"><line x1="6" x2="6" y2="12"'
            ' class="client"/></svg>dashed: the client has its first token</li>'
        )
    return f'<ul class="legend">{"".join(keys)}</ul>'
