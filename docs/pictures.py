"""Draws the pages' pictures from a document of `coldframe bench cold`, as files that stand alone.

    python docs/pictures.py cold.json

`make docs-pictures` measures and draws. The drawing is the report's own (`coldframe bench report`).
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from pathlib import Path
from typing import Any

from coldframe.benchmarks.report.boxes import boxes
from coldframe.benchmarks.report.pictures import PICTURES
from coldframe.benchmarks.report.reading import read_document
from coldframe.benchmarks.report.runs import chosen_runs
from coldframe.loader.errors import ColdframeError, RequestError
from coldframe.runtime.timeline.stage_groups import GROUPS
from coldframe.runtime.timeline.svg import element, text, width_of
from coldframe.runtime.timeline.waterfall import waterfall

__all__ = ["draw", "main"]

START = "fresh/cold/disk@200MB/s/native/http"
"""The start that is shown as a waterfall: from a slow link, by processes that start fresh."""
ROWS = {
    "warm/warm/disk/native/http": "coldframe, warm (a request to it)",
    "parked/warm/disk/native/http": "coldframe, parked (a request to it)",
    "restored/warm/disk/native/http": "coldframe, from zero, restored",
    "fresh/warm/disk/native/http": "coldframe, from zero, fresh",
    "transformers/warm/disk/run": "transformers, a script",
    "fastapi/warm/disk/http": "transformers behind FastAPI",
    "vllm/warm/disk/http": "vLLM's server, eager",
    "vllm-compiled-kept/warm/disk/http": "vLLM's server, compiled, cache kept",
}
"""The cells that stand beside one another, and what they are called; those that were measured."""
_LEGEND = 26
_SIZE = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')


def main(argv: list[str]) -> int:
    """Reads the document and writes both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", metavar="FILE", help="what bench cold has written")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent / "pictures")
    args = parser.parse_args(argv)
    try:
        drawn = draw(read_document(args.file))
    except ColdframeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    args.into.mkdir(exist_ok=True)
    for name, picture in drawn.items():
        (args.into / name).write_text(picture, encoding="utf-8")
    return 0


def draw(document: dict[str, Any]) -> dict[str, str]:
    """The pictures by their files' names.

    Args:
        document: Of kind cold.

    Raises:
        RequestError: It has not the start, or none of the cells.
    """
    if document["kind"] != "cold":
        raise RequestError("this is no document of cold starts", got=document["kind"])
    (run,) = chosen_runs([document], START)
    cells = {cell["id"]: cell for cell in document["cells"]}
    rows = [(name, cells[ident]["ttft"]) for ident, name in ROWS.items() if ident in cells]
    if not rows:
        raise RequestError("none of the cells is in it", expected=", ".join(ROWS))
    fall = waterfall(run.timeline, "cold-start", "A cold start, process by process", run.ttft_s)
    return {
        "cold-start.svg": _alone(fall, _legend()),
        "first-token.svg": _alone(boxes(rows, "first-token", "Time to the first token"), ""),
    }


def _alone(picture: str, legend: str) -> str:
    """A picture as a file: with its colours, its paper and what stands below it."""
    size = _SIZE.search(picture)
    assert size is not None
    width, height = float(size[1]), float(size[2]) + (_LEGEND if legend else 0)
    below = element("g", legend, transform=f"translate(0 {size[2]})") if legend else ""
    paper = element("rect", width="100%", height="100%", style="fill: var(--paper)")
    style = html.escape(PICTURES, quote=False)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}"'
        f' width="{width:g}" height="{height:g}">'
        f"<style>{style}</style>{paper}{picture}{below}</svg>\n"
    )


def _legend() -> str:
    """What the colours mean, in a row."""
    drawn, x = [], 12.0
    for group, told in GROUPS.items():
        drawn.append(element("rect", x=x, y=8.0, width=11.0, height=11.0, class_=f"g-{group}"))
        drawn.append(text(x + 16, 17.5, told, "faint"))
        x += 16 + width_of(told) + 18
    drawn.append(element("rect", x=x, y=8.0, width=11.0, height=11.0, class_="g-weights wait"))
    drawn.append(text(x + 16, 17.5, "pale: waiting", "faint"))
    return "".join(drawn)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
