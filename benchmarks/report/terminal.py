"""A start's waterfall for a terminal: bars in their groups' colours, the critical path above.

The lines are made of pieces with a colour each. rich shows them; where it is not installed, or the
output is no terminal, they are plain text, in which letters tell the groups apart.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from coldframe.runtime.timeline.stage_groups import GROUPS, group_of
from coldframe.runtime.timeline.svg import brief_seconds
from coldframe.runtime.timeline.timeline import UNATTRIBUTED
from coldframe.runtime.timeline.waterfall import Row, rows_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["plain_waterfall", "show_waterfall", "terminal_waterfall"]

_COLOURS = {
    "provision": "#e69f00",
    "restore": "#cc79a7",
    "weights": "#3d97d3",
    "engine": "#009e73",
    "request": "#56b4e9",
    UNATTRIBUTED: "#8c959f",
}
_LETTERS = {name: name[0] for name in GROUPS} | {"restore": "s"}
_NARROWEST = 40
Piece = tuple[str, str]
"""Text and its style, empty for none."""


def terminal_waterfall(timeline: Mapping[str, Any], console: Console) -> None:
    """Prints a start's waterfall as wide as the console is.

    Args:
        timeline: As `Timeline.to_json` makes it.
        console: rich's; one that is no terminal is given plain text.
    """
    from rich.text import Text

    if not console.is_terminal:
        for line in plain_waterfall(timeline, console.width).splitlines():
            console.print(Text(line), soft_wrap=True)
        return
    for pieces in _lines(timeline, console.width, colour=True):
        console.print(Text.assemble(*pieces), soft_wrap=True)


def plain_waterfall(timeline: Mapping[str, Any], width: int = 100) -> str:
    """The waterfall as plain text, lines without a final newline, none wider than `width`."""
    lines = ("".join(piece for piece, _ in line) for line in _lines(timeline, width, colour=False))
    return "\n".join(line.rstrip() for line in lines)


def show_waterfall(timeline: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Prints the waterfall: by rich where that is installed, else plain.

    Args:
        timeline: As `Timeline.to_json` makes it.
        file: Where to; stdout where none is given.
    """
    file = file or sys.stdout
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        print(plain_waterfall(timeline, shutil.get_terminal_size((100, 24)).columns), file=file)
        return
    terminal_waterfall(timeline, Console(file=file, highlight=False))


def _lines(timeline: Mapping[str, Any], width: int, *, colour: bool) -> list[list[Piece]]:
    width = max(_NARROWEST, width)
    rows = [row for band in rows_of(timeline).values() for row in band]
    ttft = timeline["ttft_s"]
    last = max([row.end_s for row in rows] + [float(ttft or 0), 1e-6])
    total = 1.5 * ttft if ttft and last > 2 * ttft else last
    names = [f"{row.process} {row.label}" for row in rows]
    # Half of a narrow terminal is for the bars.
    label = min(max([len(name) for name in names] + [13]), max(14, width // 2 - 10))
    room = width - label - 1 - 1 - 8
    scale = room / total
    mark = None if ttft is None else min(room - 1, int(ttft * scale))

    path = timeline["critical_path"]
    lines = [_line("critical path", _strip(path, room, scale, colour), "", label)]
    for name, row in zip(names, rows, strict=True):
        bar = _bar(row, room, scale, mark, colour)
        lines.append(_line(name, bar, brief_seconds(row.busy_s), label))
    if ttft is not None and mark is not None:
        told = f"first token {brief_seconds(ttft)}"
        begin = label + 1
        # To the left of the mark, under the labels too, where there is no room behind it.
        behind = mark + 2 + len(told) <= room
        text = " " * (begin + mark) + "^ " + told if behind else f"{told} ^".rjust(begin + mark + 1)
        lines.append([(text, "bold" if colour else "")])
    lines.append(_scale(total, room, label))
    lines.extend(_summary(timeline, width, colour))
    return lines


def _line(name: str, bar: list[Piece], length: str, label: int) -> list[Piece]:
    if len(name) > label:
        name = "~" + name[1 - label :]
    return [(f"{name:>{label}} ", ""), *bar, (f" {length:>8}" if length else "", "")]


def _paint(cells: Sequence[tuple[str, str]]) -> list[Piece]:
    """Neighbours of one style as one piece."""
    pieces: list[Piece] = []
    for char, style in cells:
        if pieces and pieces[-1][1] == style:
            pieces[-1] = (pieces[-1][0] + char, style)
        else:
            pieces.append((char, style))
    return pieces


def _extent(start: float, end: float, room: int, scale: float) -> range:
    left = min(room - 1, max(0, int(start * scale)))
    return range(left, max(left + 1, min(room, round(end * scale))))


def _strip(path: Sequence[Mapping[str, Any]], room: int, scale: float, colour: bool) -> list[Piece]:
    """The critical path: each column is the group that has most of it."""
    shares: list[dict[str, float]] = [{} for _ in range(room)]
    for step in path:
        start, end = float(step["start_s"]), float(step["end_s"])
        group = group_of(str(step["name"]), str(step["process"]))
        for at in _extent(start, end, room, scale):
            overlap = min(end, (at + 1) / scale) - max(start, at / scale)
            shares[at][group] = shares[at].get(group, 0.0) + max(0.0, overlap)
    cells = []
    for share in shares:
        group = max(share, key=lambda name: share[name], default="")
        if not group:
            cells.append((" ", ""))
        else:
            cells.append(("█", _COLOURS[group]) if colour else (_LETTERS[group], ""))
    return _paint(cells)


def _bar(row: Row, room: int, scale: float, mark: int | None, colour: bool) -> list[Piece]:
    cells = [(" ", "")] * room
    if mark is not None:
        cells[mark] = ("│", "#d55e00") if colour else ("|", "")
    for span in row.spans:
        group = group_of(str(span["name"]), row.process)
        waits = "waits_for" in span
        drawn = ("░" if waits else "█", _COLOURS[group])
        plain = ("." if waits else _LETTERS[group], "")
        for at in _extent(float(span["start_s"]), float(span["end_s"]), room, scale):
            cells[at] = drawn if colour else plain
    return _paint(cells)


def _scale(total: float, room: int, label: int) -> list[Piece]:
    end = brief_seconds(total)
    return [(" " * (label + 1) + "0" + end.rjust(room - 1), "dim")]


def _summary(timeline: Mapping[str, Any], width: int, colour: bool) -> list[list[Piece]]:
    """How long the first token waited for each group; a key to the colours, or letters."""
    if timeline["ttft_s"] is None:
        return [[("no first token", "")]]
    waited = dict.fromkeys(GROUPS, 0.0)
    for step in timeline["critical_path"]:
        group = group_of(str(step["name"]), str(step["process"]))
        waited[group] += float(step["end_s"]) - float(step["start_s"])
    lines: list[list[Piece]] = [[]]
    used = 0
    for group, seconds in waited.items():
        told = f" {group} {brief_seconds(seconds)}  "
        if used and used + 1 + len(told) > width:
            lines.append([])
            used = 0
        key = ("█", _COLOURS[group]) if colour else (_LETTERS[group], "")
        lines[-1].extend([key, (told, "")])
        used += 1 + len(told)
    return lines
