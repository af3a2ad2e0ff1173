"""The report's pictures one by one, as files that need no page around them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from coldframe.runtime.timeline.svg import STYLE

__all__ = ["PICTURES", "pictures_of"]

PICTURES = (
    STYLE
    + """
svg .box { fill: var(--request); fill-opacity: .45; stroke: var(--weights); }
svg .median { stroke: var(--ink); stroke-width: 2.5; }
svg .run { fill: var(--weights); stroke: var(--paper); stroke-width: .7; }
svg .move { fill: var(--ink); } svg text.in-move { fill: var(--paper); }
svg .track { fill: var(--line); }
svg .s-zero { fill: var(--line); } svg .s-starting { fill: var(--provision); }
svg .s-warm { fill: var(--engine); } svg .s-draining { fill: var(--request); }
svg .s-parked { fill: var(--weights); } svg .s-failed { fill: var(--mark); }
svg .f-zero { fill: var(--mark); } svg .f-parked { fill: var(--weights); }
svg .f-warm { fill: var(--engine); }
svg .half { opacity: .45; }
svg .line { fill: none; stroke-width: 2; } svg .c0 { fill: var(--weights); }
svg .c1 { fill: var(--mark); } svg .c2 { fill: var(--engine); } svg .c3 { fill: var(--restore); }
svg .c4 { fill: var(--provision); } svg .l0 { stroke: var(--weights); }
svg .l1 { stroke: var(--mark); stroke-dasharray: 6 3; } svg .l2 { stroke: var(--engine);
  stroke-dasharray: 2 2; } svg .l3 { stroke: var(--restore); stroke-dasharray: 8 2 2 2; }
svg .l4 { stroke: var(--provision); } svg .limit { stroke: var(--mark); stroke-dasharray: 4 3; }
svg .leader { stroke: var(--faint); }
svg .dot-text { fill: var(--on-weights); font-weight: 700; } svg .star { fill: var(--mark); }
"""
)
"""The style of everything that is drawn; a picture's own file has it inside."""

# Legends are pictures, too, of a spot of colour each: they have no name.
_PICTURE = re.compile(r'<svg (id="([^"]+)" role="img" .*?)</svg>', re.DOTALL)
_BACKGROUND = '<rect width="100%" height="100%" style="fill: var(--paper)"/>'


def pictures_of(page: str) -> Iterator[tuple[str, str]]:
    """The named pictures of a report, in its order: each its id and an SVG document.

    Args:
        page: What `report_page` made. What is drawn is the same here as there.
    """
    for found in _PICTURE.finditer(page):
        opened, drawn = found[1].split(">", 1)
        yield (
            found[2],
            f'<svg xmlns="http://www.w3.org/2000/svg" {opened}>'
            f"<style>{PICTURES}</style>{_BACKGROUND}{drawn}</svg>\n",
        )
