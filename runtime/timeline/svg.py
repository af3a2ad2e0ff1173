"""What inline pictures are made of: elements, text that fits, axes, and colours told apart by all.

The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), lighter on dark paper. A page
that shows these pictures takes `STYLE` into its head; nothing else is needed, from nowhere.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "STYLE",
    "Axis",
    "brief_seconds",
    "element",
    "fitted",
    "number",
    "picture",
    "round_step",
    "seconds_ticks",
    "text",
    "width_of",
]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f8; --ink: #1b1f23; --faint: #57606a;
  --line: #d8dee4; --provision: #e69f00; --restore: #cc79a7; --weights: #0072b2; --engine: #009e73;
  --request: #56b4e9; --unattributed: #8c959f; --mark: #d55e00; --on-weights: #fff; --bar: #fff; }
@media (prefers-color-scheme: dark) { :root { --paper: #101418; --card: #181e24; --ink: #e6eaee;
  --faint: #9fb0bf; --line: #36424d; --provision: #eeb13a; --restore: #e09cc4; --weights: #3d97d3;
  --engine: #2cba8d; --request: #8fd0f5; --unattributed: #7d8995; --mark: #ff8a3d;
  --on-weights: #06131c; --bar: #101418; } }
svg { display: block; font: 11px system-ui, "DejaVu Sans", sans-serif; }
svg text { fill: var(--ink); }
svg .faint { fill: var(--faint); }
svg .strong { font-weight: 600; }
svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .rule { stroke: var(--faint); stroke-width: 1; }
svg .first { stroke: var(--mark); stroke-width: 1.5; }
svg .client { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg .first-text { fill: var(--mark); font-weight: 600; paint-order: stroke; stroke: var(--paper);
  stroke-width: 3; }
svg .g-provision { fill: var(--provision); } svg .g-restore { fill: var(--restore); }
svg .g-weights { fill: var(--weights); } svg .g-engine { fill: var(--engine); }
svg .g-request { fill: var(--request); } svg .g-unattributed { fill: var(--unattributed); }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 3; }
svg .wait { opacity: .3; }
svg .on { fill: var(--ink); }
svg text.in { fill: #101418; } svg text.in-weights { fill: var(--on-weights); }
"""

_NARROW = frozenset("iljtfrI.,:;'|!()[]{}/ -")
_WIDE = frozenset("mwMW@%")
_STEPS = (1.0, 2.0, 5.0, 10.0)


def number(value: float) -> str:
    """A length or place in a picture, as short as it is exact to a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def element(name: str, content: str | None = None, /, **attributes: object) -> str:
    """An element, its attributes escaped; content is markup already.

    Args:
        name: Its tag.
        content: What is in it, or None for an element that closes itself.
        attributes: `_` stands for `-` in their names, one at the end is left out; numbers of
            places are written short, `None` is no attribute.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None:
            continue
        key = key.rstrip("_").replace("_", "-")
        # What is drawn is told exactly; where it is drawn need not be.
        exact = key.startswith("data-") or not isinstance(value, float)
        text = str(value) if exact else number(float(str(value)))
        parts.append(f'{key}="{html.escape(text)}"')
    opened = " ".join(parts)
    return f"<{opened}/>" if content is None else f"<{opened}>{content}</{name}>"


def text(
    x: float, y: float, content: str, style: str | None = None, *, title: str | None = None
) -> str:
    """A line of text at its baseline; a title shows where somebody points."""
    told = "" if title is None else f"<title>{html.escape(title)}</title>"
    return element("text", html.escape(content) + told, x=float(x), y=float(y), class_=style)


def picture(ident: str, title: str, desc: str, width: float, height: float, content: str) -> str:
    """A picture that scales with its place and has a name and a description.

    Args:
        ident: An id, unique within the page.
        title: What it is.
        desc: What it shows, for those who do not see it.
        width: In pixels, as is the height.
        height: In pixels.
        content: Markup.
    """
    head = element("title", html.escape(title), id=f"{ident}-t")
    head += element("desc", html.escape(desc), id=f"{ident}-d")
    return (
        f'<svg id="{ident}" role="img" aria-labelledby="{ident}-t {ident}-d"'
        f' viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}"'
        f' height="{number(height)}">{head}{content}</svg>'
    )


def width_of(content: str, size: float = 11) -> float:
    """About how wide a line is in pixels, rather too wide: fonts differ."""
    units = 0.0
    for char in content:
        if char in _NARROW:
            units += 0.4
        elif char in _WIDE or ord(char) > 0x2E7F:
            units += 1.0
        else:
            units += 0.72 if char.isupper() else 0.64
    return units * size


def fitted(content: str, width: float, size: float = 11) -> str:
    """The text, or as much of its beginning as has room, with an ellipsis."""
    if width_of(content, size) <= width:
        return content
    while content and width_of(content + "…", size) > width:
        content = content[:-1]
    return content.rstrip() + "…" if content else ""


def brief_seconds(seconds: float) -> str:
    """Three digits and the unit that suits them: 312 µs, 96.0 ms, 1.97 s, 1234 s."""
    if seconds == 0:
        return "0 s"
    size = abs(seconds)
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if size * scale < 999.5:
            return f"{_three(seconds * scale)} {unit}"
    return f"{_three(seconds)} s"


def _three(value: float) -> str:
    size = abs(value)
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to places.

    Args:
        low: The value at its beginning.
        high: The one at its end, above `low`.
        start: The place of `low`, in pixels.
        end: The place of `high`.
        log: Whether equal steps are equal ratios; both values are above zero then.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value; what lies beyond the axis is at its end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share

    def ticks(self, about: int = 8) -> list[float]:
        """Round values along it, at most about so many."""
        if self.log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
            wanted = (1, 2, 5) if len(exponents) <= about / 2 else (1,)
            found = [m * 10.0**e for e in (*exponents, exponents[-1] + 1) for m in wanted]
            thinned = found[:: max(1, math.ceil(len(found) / (1.5 * about)))]
            return [value for value in thinned if self.low <= value <= self.high * (1 + 1e-9)]
        step = round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten: the next from some value on."""
    scale = 10.0 ** math.floor(math.log10(least))
    return scale * next(step for step in _STEPS if step * scale >= least * (1 - 1e-9))


def seconds_ticks(ticks: Sequence[float]) -> list[str]:
    """Ticks of a linear axis in one unit, with as many digits as tell them apart."""
    top = max(ticks, default=0.0)
    unit, scale = ("s", 1.0) if top >= 1 else ("ms", 1e3) if top >= 1e-3 else ("µs", 1e6)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else top or 1.0
    digits = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    return [f"{tick * scale:.{digits}f} {unit}" if tick else "0" for tick in ticks]
