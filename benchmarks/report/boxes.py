"""Box plots: for each of several figures its quartiles, its whiskers and every run as a point."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from coldframe.benchmarks.document import percentile
from coldframe.benchmarks.report.markup import shown
from coldframe.runtime.timeline.svg import Axis, element, fitted, picture, seconds_ticks, text

__all__ = ["boxes", "value_axis"]

_WIDTH = 1000
_LEFT = 250
_RIGHT = 90
_ROW = 26
_LOG_FROM = 30


def value_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis for some times: from zero, or in ratios where they differ by more than 30."""
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM:
        return Axis(low / 1.15, high * 1.15, start, end, log=True)
    return Axis(0.0, max(high, 1e-6) * 1.03, start, end)


def axis_labels(axis: Axis, ticks: Sequence[float]) -> list[str]:
    """Texts of an axis of seconds."""
    return [shown(tick, "s") for tick in ticks] if axis.log else seconds_ticks(ticks)


def boxes(rows: Sequence[tuple[str, dict[str, Any]]], ident: str, title: str) -> str:
    """The picture, as SVG markup.

    The box is from the first quartile to the third, the thick line the median; whiskers reach the
    furthest run within one and a half times the box's length of it (Tukey).

    Args:
        rows: A name and a figure in seconds each; at least one.
        ident: An id that is unique within the page.
        title: What it shows.
    """
    axis = value_axis([run for _, fig in rows for run in fig["runs"]], _LEFT, _WIDTH - _RIGHT)
    bottom = 6.0 + _ROW * len(rows)
    drawn = []
    ticks = axis.ticks()
    for tick, label in zip(ticks, axis_labels(axis, ticks), strict=True):
        x = axis.at(tick)
        drawn.append(element("line", x1=x, x2=x, y1=2.0, y2=bottom, class_="grid"))
        drawn.append(text(x, bottom + 14, label, "middle faint"))
    note = "log scale" if axis.log else "from the exec on"
    drawn.append(text(_LEFT - 24, bottom + 14, note, "end faint"))
    for number, (name, fig) in enumerate(rows):
        drawn.append(_box(name, fig, axis, 6.0 + _ROW * number))
    desc = f"{len(rows)} rows with {sum(len(fig['runs']) for _, fig in rows)} runs as points."
    return picture(ident, title, desc, _WIDTH, bottom + 20, "".join(drawn))


def _box(name: str, fig: dict[str, Any], axis: Axis, y: float) -> str:
    runs = fig["runs"]
    q1, q3 = percentile(runs, 0.25), percentile(runs, 0.75)
    reach = 1.5 * (q3 - q1)
    low = min(run for run in runs if run >= q1 - reach)
    high = max(run for run in runs if run <= q3 + reach)
    middle = y + 10
    x1, x3, xm = axis.at(q1), axis.at(q3), axis.at(fig["median"])
    parts = [text(_LEFT - 10, y + 14, fitted(name, _LEFT - 20), "end", title=name)]
    for a, b in ((low, q1), (q3, high)):
        parts.append(
            element("line", x1=axis.at(a), x2=axis.at(b), y1=middle, y2=middle, class_="rule")
        )
    for end in (low, high):
        x = axis.at(end)
        parts.append(element("line", x1=x, x2=x, y1=y + 6, y2=y + 14, class_="rule"))
    parts.append(
        element(
            "rect",
            x=x1,
            y=y + 3,
            width=max(1.0, x3 - x1),
            height=14.0,
            class_="box",
            data_q1=q1,
            data_q3=q3,
        )
    )
    parts.append(
        element(
            "line", x1=xm, x2=xm, y1=y + 2, y2=y + 18, class_="median", data_value=fig["median"]
        )
    )
    for number, run in enumerate(runs):
        # Points on one another are told apart by their heights.
        lift = ((number * 5) % 9 - 4) * 0.9
        said = f"{name}, run {number + 1}: {shown(run, 's')}"
        told = f"<title>{html.escape(said)}</title>"
        parts.append(
            element(
                "circle",
                told,
                cx=axis.at(run),
                cy=middle + lift,
                r=2.6,
                class_="run",
                data_value=run,
            )
        )
    x = axis.at(max(runs))
    parts.append(text(x + 8, y + 14, shown(fig["median"], "s"), "strong halo"))
    return element(
        "g", "".join(parts), class_="boxplot", data_cell=name, data_low=low, data_high=high
    )
