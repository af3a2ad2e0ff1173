"""The timeline as a table for a terminal: every stage with its bar, then the critical path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coldframe.loader.timeline import Span
from coldframe.runtime.timeline.stage_groups import stage_of
from coldframe.runtime.timeline.timeline import Timeline
from coldframe.runtime.units import human_seconds

__all__ = ["render"]

_WIDTH = 40


@dataclass(slots=True)
class _Row:
    process: str
    name: str
    start_ns: int
    end_ns: int
    busy_ns: int
    count: int = 1
    note: str | None = None


def render(timeline: Timeline) -> str:
    """The table, several lines without a final newline."""
    rows = _rows(timeline.spans)
    end = max([row.end_ns for row in rows] + [timeline.first_token_ns or 0])
    total = max(1, end - timeline.exec_ns)
    name_width = max((len(_label(row)) for row in rows), default=0)
    process_width = max((len(row.process) for row in rows), default=0)
    lines = [
        f"{'process':<{process_width}}  {'stage':<{name_width}}  {'from':>8}  {'takes':>8}",
    ]
    for row in rows:
        bar = _bar(row.start_ns - timeline.exec_ns, row.end_ns - timeline.exec_ns, total)
        lines.append(
            f"{row.process:<{process_width}}  {_label(row):<{name_width}}"
            f"  {human_seconds(timeline.seconds(row.start_ns)):>8}"
            f"  {human_seconds(row.busy_ns / 1e9):>8}  {bar}"
            + ("" if row.note is None else f"  {row.note}")
        )
    return "\n".join(line.rstrip() for line in [*lines, "", *_path(timeline)])


def _path(timeline: Timeline) -> list[str]:
    """What the first token waited for: the stages of the critical path, most costly first."""
    if timeline.first_token_ns is None:
        return ["no first token"]
    shares: dict[tuple[str, str], float] = {}
    for step in timeline.critical_path():
        key = (stage_of(step.name), step.process)
        shares[key] = shares.get(key, 0.0) + step.seconds
    ttft = timeline.seconds(timeline.first_token_ns)
    lines = [f"first token after {human_seconds(ttft)}, which it spent waiting for"]
    for (name, process), seconds in sorted(shares.items(), key=lambda item: -item[1]):
        if seconds < ttft / 2000:
            continue
        where = f"{process} {name}".strip()
        lines.append(f"  {human_seconds(seconds):>8}  {100 * seconds / ttft:5.1f} %  {where}")
    return lines


def _rows(spans: Sequence[Span]) -> list[_Row]:
    """A row for each stage of each process; `prefill[0]` ... `prefill[15]` share one."""
    rows: dict[tuple[str, str], _Row] = {}
    for span in spans:
        if span.waits_for is not None:
            continue
        key = (span.process, stage_of(span.name))
        row = rows.get(key)
        length = span.end_ns - span.start_ns
        if row is None:
            rows[key] = _Row(*key, span.start_ns, span.end_ns, length, note=span.note)
        else:
            row.start_ns = min(row.start_ns, span.start_ns)
            row.end_ns = max(row.end_ns, span.end_ns)
            row.busy_ns += length
            row.count += 1
            row.note = None
    first: dict[str, int] = {}
    for row in rows.values():
        first[row.process] = min(row.start_ns, first.get(row.process, row.start_ns))
    return sorted(rows.values(), key=lambda row: (first[row.process], row.process, row.start_ns))


def _label(row: _Row) -> str:
    return row.name if row.count == 1 else f"{row.name} x{row.count}"


def _bar(start: int, end: int, total: int) -> str:
    left = min(_WIDTH - 1, max(0, round(_WIDTH * start / total)))
    right = min(_WIDTH, max(left + 1, round(_WIDTH * end / total)))
    return " " * left + "█" * (right - left) + " " * (_WIDTH - right)
