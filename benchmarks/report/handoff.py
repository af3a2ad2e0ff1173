"""The report's section of hand-offs: a row each, with a bar for what it took beyond a step."""

from __future__ import annotations

from typing import Any

from coldframe.benchmarks.report.boxes import boxes
from coldframe.benchmarks.report.markup import (
    esc,
    figure_html,
    left_out,
    number_cell,
    section,
    table,
    text_cell,
)
from coldframe.runtime.timeline.svg import Axis, element, fitted, picture, seconds_ticks, text

__all__ = ["handoff_section"]

_FIGURES = ("ttft", "second", "step", "beyond")
_WIDTH, _LEFT, _RIGHT, _ROW = 1000, 250, 90, 22


def handoff_section(document: dict[str, Any], ident: str) -> str:
    """A handoff document as HTML.

    Args:
        document: Of kind handoff.
        ident: An id that is unique within the page.
    """
    cells = document["cells"]
    rows = [
        [
            f'<th scope="row">{esc(cell["id"])}</th>',
            text_cell(cell["prompt_tokens"], "num"),
            *(number_cell(cell[key]["median"], "s", key) for key in _FIGURES),
            number_cell(cell["bytes"], "B", "bytes"),
            number_cell(cell["rate"]["median"] if cell["rate"] else None, "B/s", "rate"),
            text_cell({True: "equal", False: "differ", None: ""}[cell["tokens_equal"]]),
        ]
        for cell in cells
    ]
    heads = ["", "prompt", "first token", "to the second", "a step", "beyond a step", "KV bytes"]
    heads += ["rate", "tokens"]
    names = [cell["id"] for cell in cells]
    parts = [table("Each hand-off, medians", heads, rows, names=names), left_out(document)]
    if cells:
        drawn = _bars(cells, f"{ident}-bars")
        note = "From the first token to the second: dark is a step of decode, orange lies beyond."
        parts.append(f"<h3>From one worker to the other</h3>{figure_html(drawn, note)}")
        plots = boxes(
            [(cell["id"], cell["second"]) for cell in cells],
            f"{ident}-boxes",
            "From the first token to the second",
        )
        parts.append(figure_html(plots, "From the first token to the second, every run a point."))
    return section(f"Hand-off of {document['model']['path']}", *parts, ident=ident)


def _bars(cells: list[dict[str, Any]], ident: str) -> str:
    most = max(max(cell["second"]["median"], cell["step"]["median"]) for cell in cells)
    axis = Axis(0.0, max(most, 1e-6) * 1.03, _LEFT, _WIDTH - _RIGHT)
    bottom = 4.0 + _ROW * len(cells)
    ticks = axis.ticks()
    drawn = []
    for tick, label in zip(ticks, seconds_ticks(ticks), strict=True):
        x = axis.at(tick)
        drawn.append(element("line", x1=x, x2=x, y1=2.0, y2=bottom, class_="grid"))
        drawn.append(text(x, bottom + 14, label, "middle faint"))
    for number, cell in enumerate(cells):
        y = 4.0 + _ROW * number
        drawn.append(text(_LEFT - 10, y + 13, fitted(cell["id"], _LEFT - 20), "end"))
        end = 0.0
        for key, until, style in (
            ("second", cell["second"]["median"], "g-provision"),
            ("step", min(cell["step"]["median"], cell["second"]["median"]), "move"),
        ):
            end = max(end, axis.at(until))
            drawn.append(
                element(
                    "rect",
                    x=float(_LEFT),
                    y=y + 3,
                    width=axis.at(until) - _LEFT,
                    height=14.0,
                    class_=f"handoff {style}",
                    data_cell=cell["id"],
                    data_name=key,
                    data_value=cell[key]["median"],
                )
            )
        told = f"{1000 * cell['beyond']['median']:+.1f} ms"
        drawn.append(text(end + 6, y + 14, told, "strong halo"))
    return picture(
        ident,
        "From the first token to the second",
        f"{len(cells)} hand-offs.",
        _WIDTH,
        bottom + 20,
        "".join(drawn),
    )
