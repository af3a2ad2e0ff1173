"""How near each cell is to the time that its bytes take: a bar for its time to the first token.

The whole bar is the median TTFT. Its solid part is the time to move the bytes at the measured
ceiling. What lies beyond is divided by what the critical path waited for, in the mean of the runs.
Where the path's stages were waited for while bytes moved, there is less beyond than they took in
sum; they are drawn shorter then, all in one proportion, and keep what they took in `data-path`.
"""

from __future__ import annotations

import html
from typing import Any

from coldframe.benchmarks.report.markup import shown
from coldframe.runtime.timeline.stage_groups import GROUPS, group_of
from coldframe.runtime.timeline.svg import element, fitted, picture, text, width_of
from coldframe.runtime.timeline.timeline import UNATTRIBUTED

__all__ = ["beyond", "roofline"]

_WIDTH = 1000
_LEFT = 250
_BAR = 470
_ROW = 30
_TOP = 26


def beyond(cell: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What a cell's TTFT waited for beyond the time to move the bytes.

    Args:
        cell: A cell of a cold document, with `move`.

    Returns:
        Group, seconds as drawn, and seconds of the critical path. The seconds as drawn and the time
        to move are the median TTFT in sum; all of it is unattributed where there is no path.
    """
    ttft, move = cell["ttft"]["median"], cell["move"]["median"]
    left = max(0.0, ttft - move)
    taken = {group: share * ttft for group, share in _shares(cell["path"]).items()}
    if not taken:
        return [(UNATTRIBUTED, left, 0.0)] if left else []
    # Moving the bytes is what the weights' part of the path is for: only the rest of it is beyond.
    over = {**taken, "weights": max(0.0, taken["weights"] - move)}
    whole = sum(over.values())
    scale = left / whole if whole else 0.0
    return [(group, over[group] * scale, taken[group]) for group in GROUPS if over[group]]


def _shares(path: list[dict[str, Any]]) -> dict[str, float]:
    """The mean share that each group has of the path, over the runs; empty where there is none.

    Medians of the parts would not be that of the whole.
    """
    runs = list(zip(*(step["seconds"]["runs"] for step in path), strict=True))
    told = [(run, whole) for run in runs if (whole := sum(run)) > 0]
    if not told:
        return {}
    found = dict.fromkeys(GROUPS, 0.0)
    for run, whole in told:
        for step, seconds in zip(path, run, strict=True):
            found[group_of(step["name"], step["process"])] += seconds / whole / len(told)
    return found


def roofline(cells: list[dict[str, Any]], ident: str, title: str) -> str:
    """The picture, as SVG markup.

    Args:
        cells: Those of a cold document that have a time to move their bytes; at least one.
        ident: An id that is unique within the page.
        title: What it shows.
    """
    bottom = float(_TOP + _ROW * len(cells))
    drawn = []
    for share in (0, 25, 50, 75, 100):
        x = _LEFT + _BAR * share / 100
        drawn.append(element("line", x1=x, x2=x, y1=_TOP - 4.0, y2=bottom, class_="grid"))
        drawn.append(text(x, bottom + 14, f"{share} %", "middle faint"))
    drawn.append(text(_LEFT - 24, bottom + 14, "of the median TTFT", "end faint"))
    drawn.append(text(_LEFT + _BAR + 14, 14, "TTFT / move", "faint"))
    drawn.append(text(_LEFT + _BAR + 106, 14, "rate of ceiling", "faint"))
    for number, cell in enumerate(cells):
        drawn.append(_bar(cell, float(_TOP + _ROW * number)))
    desc = "; ".join(
        f"{cell['id']}: {shown(cell['ttft']['median'], 's')}, of which"
        f" {shown(cell['move']['median'], 's')} to move the bytes"
        for cell in cells[:12]
    )
    return picture(ident, title, desc, _WIDTH, bottom + 20, "".join(drawn))


def _bar(cell: dict[str, Any], y: float) -> str:
    ttft, move = cell["ttft"]["median"], cell["move"]["median"]
    parts = [text(_LEFT - 10, y + 15, fitted(cell["id"], _LEFT - 20), "end", title=cell["id"])]
    # A start may take less than its bytes at the ceiling, by the noise of both.
    solid = _BAR * min(1.0, move / ttft)
    parts.append(_part("move", "time to move the bytes", move, None, _LEFT, solid, y))
    if width_of(shown(move, "s")) < solid - 6:
        style = "middle in-move"
        parts.append(text(_LEFT + solid / 2, y + 15, shown(move, "s"), style))
    x = _LEFT + solid
    for group, seconds, path in beyond(cell):
        width = _BAR * seconds / ttft
        parts.append(_part(group, GROUPS[group], seconds, path, x, width, y))
        if width_of(group) < width - 6:
            parts.append(text(x + width / 2, y + 15, group, f"middle in in-{group}"))
        x += width
    ratio = cell["ratio"]["median"] if cell["ratio"] else None
    parts.append(text(_LEFT + _BAR + 14, y + 15, shown(ratio, "1"), "strong"))
    if cell["rate"] and cell["ceiling"]:
        rate, top = cell["rate"]["median"], cell["ceiling"]["rate"]["median"]
        x = _LEFT + _BAR + 106
        track = element("rect", x=x, y=y + 8.0, width=50.0, height=6.0, class_="track")
        full = 50.0 * min(1.0, rate / top)
        parts.append(track)
        parts.append(
            element(
                "rect",
                x=x,
                y=y + 8.0,
                width=full,
                height=6.0,
                class_="move",
                data_rate=rate,
                data_ceiling=top,
            )
        )
        told = f"{rate / top:.0%}: {shown(rate, 'B/s')}"
        parts.append(text(x + 56, y + 15, told, "faint", title=f"of {shown(top, 'B/s')}"))
    return element("g", "".join(parts), class_="roof", data_cell=cell["id"], data_ttft=ttft)


def _part(
    group: str, told: str, seconds: float, path: float | None, x: float, width: float, y: float
) -> str:
    said = f"{told}: {shown(seconds, 's')}"
    if path:
        said += f" beyond the bytes, {shown(path, 's')} of the critical path"
    style = "move" if group == "move" else f"g-{group}"
    return element(
        "rect",
        f"<title>{html.escape(said)}</title>",
        x=x,
        y=y + 3.0,
        width=float(width),
        height=17.0,
        class_=f"part {style}",
        data_group=group,
        data_value=seconds,
        data_path=path,
    )
