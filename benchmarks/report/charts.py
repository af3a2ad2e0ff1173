"""Charts of points and lines with two axes."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from coldframe.benchmarks.report.markup import shown
from coldframe.runtime.timeline.svg import Axis, element, number, picture, seconds_ticks, text

__all__ = ["Point", "Scale", "Series", "chart"]

WIDTH = 1000
_LEFT = 78
_RIGHT = 24
_TOP = 14
_HEIGHT = 260
_LOG_FROM = 30


@dataclass(frozen=True, slots=True)
class Point:
    """One point.

    Args:
        x: Its value.
        y: Its value.
        told: What shows where somebody points at it.
        text: What stands in it; such a point is large.
        star: Whether it stands out.
    """

    x: float
    y: float
    told: str = ""
    text: str = ""
    star: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """Points of a kind.

    Args:
        name: What they are.
        points: In their order.
        style: The class of their colour, such as `c0`.
        line: The class of the line through them, such as `l0`; none for no line.
        dots: Whether the points are drawn.
    """

    name: str
    points: Sequence[Point]
    style: str
    line: str = ""
    dots: bool = True


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis as wanted.

    Args:
        label: What it is of.
        unit: As `markup.shown` knows them.
        log: Whether it may be in ratios, where its values differ much.
        top: Where it ends, if not at the greatest value.
        limits: Values to mark with a line, each with its name.
    """

    label: str
    unit: str
    log: bool = False
    top: float | None = None
    limits: Sequence[tuple[float, str]] = field(default_factory=tuple)

    def axis(self, values: Sequence[float], start: float, end: float) -> Axis:
        every = [*values, *(value for value, _ in self.limits)]
        above = [value for value in every if value > 0]
        if self.log and above and max(above) / min(above) > _LOG_FROM and len(above) == len(every):
            return Axis(min(above) / 1.3, max(above) * 1.3, start, end, log=True)
        high = max(above, default=1.0) * 1.06 if self.top is None else self.top
        return Axis(0.0, high, start, end)

    def labels(self, axis: Axis, ticks: Sequence[float]) -> list[str]:
        if self.unit == "s" and not axis.log:
            return seconds_ticks(ticks)
        if self.unit == "%":
            return [f"{100 * tick:.3g} %" for tick in ticks]
        if self.unit == "s":
            return [shown(tick, "s") for tick in ticks]
        return [f"{tick:,.4g}" for tick in ticks]


def chart(
    ident: str, title: str, desc: str, series: Sequence[Series], across: Scale, up: Scale
) -> str:
    """The picture, as SVG markup.

    Args:
        ident: An id that is unique within the page.
        title: What it shows.
        desc: What is to be seen.
        series: At least one point in all.
        across: The axis of `x`.
        up: The axis of `y`.
    """
    points = [point for one in series for point in one.points]
    bottom = float(_TOP + _HEIGHT)
    xs = across.axis([point.x for point in points], _LEFT, WIDTH - _RIGHT)
    ys = up.axis([point.y for point in points], bottom, _TOP)
    drawn = _grid(xs, ys, across, up, bottom)
    for one in series:
        drawn.append(_series(one, xs, ys))
    return picture(ident, title, desc, WIDTH, bottom + 42, "".join(drawn))


def _grid(xs: Axis, ys: Axis, across: Scale, up: Scale, bottom: float) -> list[str]:
    drawn = []
    ticks = ys.ticks(6)
    for tick, label in zip(ticks, up.labels(ys, ticks), strict=True):
        y = ys.at(tick)
        drawn.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        drawn.append(text(_LEFT - 8, y + 4, label, "end faint"))
    ticks = xs.ticks(8)
    for tick, label in zip(ticks, across.labels(xs, ticks), strict=True):
        x = xs.at(tick)
        drawn.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="rule"))
        drawn.append(text(x, bottom + 17, label, "middle faint"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    name = across.label + (" (log scale)" if xs.log else "")
    drawn.append(text(middle, bottom + 36, name, "middle faint"))
    name = up.label + (" (log scale)" if ys.log else "")
    y = (_TOP + bottom) / 2
    turned = f'<g transform="translate(12 {number(y)}) rotate(-90)">'
    drawn.append(turned + text(0, 0, name, "middle faint") + "</g>")
    for value, told in up.limits:
        y = ys.at(value)
        drawn.append(
            element(
                "line",
                x1=_LEFT,
                x2=WIDTH - _RIGHT,
                y1=y,
                y2=y,
                class_="limit",
                data_limit=value,
            )
        )
        drawn.append(text(WIDTH - _RIGHT - 4, y - 5, told, "end first-text"))
    return drawn


def _series(one: Series, xs: Axis, ys: Axis) -> str:
    places = [(xs.at(point.x), ys.at(point.y)) for point in one.points]
    drawn = []
    if one.line and len(places) > 1:
        path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in places)
        drawn.append(element("path", d=path, class_=f"line {one.line}"))
    taken: list[tuple[float, float]] = []
    bubbles = []
    for point, (x, y) in zip(one.points, places, strict=True) if one.dots else ():
        told = f"<title>{html.escape(point.told or one.name)}</title>"
        style = f"dot {'star' if point.star else one.style}"
        drawn.append(
            element(
                "circle",
                told,
                cx=x,
                cy=y,
                r=4.0 if point.text else 2.2,
                class_=style,
                data_x=point.x,
                data_y=point.y,
            )
        )
        if point.text:
            style = "star" if point.star else one.style
            bubbles.append(_bubble(point.text, x, y, taken, style, told))
    return element("g", "".join([*drawn, *bubbles]), class_="series", data_name=one.name)


def _bubble(
    content: str, x: float, y: float, taken: list[tuple[float, float]], style: str, told: str
) -> str:
    """A number at its point; where another one is there already, beside it, tied to it."""
    places = [(x, y)]
    for ring in (24, 48, 72, 96):
        for turn in range(12):
            angle = math.tau * (turn - 2) / 12
            places.append((x + ring * math.cos(angle), y + ring * math.sin(angle)))
    inside = [
        (a, b)
        for a, b in places
        if _LEFT - 12 < a < WIDTH - _RIGHT + 12 and 12 < b < _TOP + _HEIGHT - 12
    ] or places
    free = (p for p in inside if all(math.dist(p, other) >= 21 for other in taken))
    at = next(free, inside[-1])
    taken.append(at)
    drawn = ""
    if at != (x, y):
        drawn = element("line", x1=x, y1=y, x2=at[0], y2=at[1], class_="leader")
    drawn += element("circle", told, cx=at[0], cy=at[1], r=10.0, class_=f"bubble {style}")
    return drawn + text(at[0], at[1] + 4, content, "middle dot-text")
