"""What sections of the report are made of: tables, figures, and numbers as text.

Each cell of a table that shows a number of the document has the number itself in `data-value`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from coldframe.runtime.timeline.svg import brief_seconds
from coldframe.runtime.units import human_bytes

__all__ = ["Cell", "esc", "figure_html", "number_cell", "section", "shown", "table"]

Cell = str
"""Markup of a `<td>`."""


def esc(content: object) -> str:
    """Text for between tags, and for attributes."""
    return html.escape(str(content))


def shown(value: float | None, unit: str) -> str:
    """A number as people read it: three digits and the unit that suits it; a dash for none."""
    if value is None:
        return "–"  # noqa: RUF001
    match unit:
        case "s":
            return brief_seconds(value)
        case "B":
            return human_bytes(value)
        case "B/s":
            return f"{human_bytes(value)}/s"
        case "%":
            return f"{100 * value:.1f} %"
        case "1" | "ratio":
            return f"{value:.2f}x"
        case _:
            return f"{value:,.4g} {unit}".strip()


def number_cell(value: float | None, unit: str, name: str, style: str = "num") -> Cell:
    """A table's cell with a number.

    Args:
        value: It, or None for a dash.
        unit: As in `shown`.
        name: What it is, for `data-name`.
        style: Its class.
    """
    exact = "" if value is None else f' data-value="{value!r}"'
    return f'<td class="{style}" data-name="{esc(name)}"{exact}>{esc(shown(value, unit))}</td>'


def text_cell(content: object, style: str = "") -> Cell:
    """A table's cell with text."""
    styled = f' class="{style}"' if style else ""
    return f"<td{styled}>{esc(content)}</td>"


def table(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    names: Sequence[str] | None = None,
    style: str = "",
) -> str:
    """A table that scrolls where it has no room.

    Args:
        caption: What it shows.
        heads: One for each column.
        rows: Of cells; the first of each is its head.
        names: For each row, what `data-row` says.
        style: Its class.
    """
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in heads)
    body = []
    for number, row in enumerate(rows):
        called = "" if names is None else f' data-row="{esc(names[number])}"'
        body.append(f"<tr{called}>{''.join(row)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}">'
        f'<table class="{esc(style)}"><caption>{esc(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def figure_html(drawn: str, caption: str, legend: str = "") -> str:
    """A picture with what it shows under it; it scrolls where it has no room."""
    return (
        f'<figure>{legend}<div class="scroll" tabindex="0" role="region"'
        f' aria-label="{esc(caption)}">{drawn}</div>'
        f"<figcaption>{esc(caption)}</figcaption></figure>"
    )


def section(title: str, *parts: str, ident: str) -> str:
    """A section of the page."""
    return f'<section id="{esc(ident)}"><h2>{esc(title)}</h2>{"".join(parts)}</section>'


def keys(items: Sequence[tuple[str, str]], ident: str = "legend") -> str:
    """A legend: classes of colour and what they mean."""
    made = "".join(
        '<li><svg width="12" height="12" aria-hidden="true"><rect width="12" height="12" rx="2"'
        f' class="{esc(style)}"/></svg>{esc(told)}</li>'
        for style, told in items
    )
    return f'<ul class="{ident}">{made}</ul>'


def left_out(document: dict[str, Any]) -> str:
    """What was not measured, and why."""
    if not document.get("left_out"):
        return ""
    items = "".join(
        f"<li><b>{esc(item['what'])}</b>: {esc(item['why'])}</li>" for item in document["left_out"]
    )
    count = len(document["left_out"])
    return f"<details><summary>Left out ({count})</summary><ul>{items}</ul></details>"
