"""The report's section of cold starts: headline, box plots, roofline and waterfalls."""

from __future__ import annotations

from typing import Any

from coldframe.benchmarks.report.boxes import boxes
from coldframe.benchmarks.report.markup import (
    Cell,
    esc,
    figure_html,
    keys,
    left_out,
    number_cell,
    section,
    shown,
    table,
    text_cell,
)
from coldframe.benchmarks.report.roofline import roofline
from coldframe.benchmarks.report.runs import median_start
from coldframe.runtime.timeline.stage_groups import GROUPS
from coldframe.runtime.timeline.waterfall import legend, waterfall

__all__ = ["cold_section"]

_WATERFALLS = 100
_SPANS = 12_000


def cold_section(document: dict[str, Any], ident: str) -> str:
    """A cold document as HTML.

    Args:
        document: Of kind cold.
        ident: An id that is unique within the page.
    """
    model, cells = document["model"], document["cells"]
    said = (
        f"Runs of each cell: {document['runs']}; a prompt of {document['prompt_tokens']} tokens, "
        f"{document['answer_tokens']} in answer; {shown(model['weights_bytes'], 'B')} of weights."
    )
    if document.get("interrupted"):
        said += " It was interrupted; the runs are those of the rounds that were finished."
    parts = [f"<p>{esc(said)}</p>", _headline(cells)]
    parts.append(_baseline(document["baseline"]))
    parts.append(left_out(document))
    if cells:
        drawn = boxes(
            [(cell["id"], cell["ttft"]) for cell in cells],
            f"{ident}-boxes",
            "Time to the first token of each cell",
        )
        caption = (
            "Time to the first token: box from the first quartile to the third, the median thick,"
            " whiskers to the last run within 1.5 box lengths, every run a point."
        )
        parts.append(f"<h3>Time to the first token</h3>{figure_html(drawn, caption)}")
    parts.append(_roof(cells, ident))
    parts.append(_waterfalls(cells, ident))
    return section(f"Cold starts of {model['path']}", *parts, ident=ident)


def _headline(cells: list[dict[str, Any]]) -> str:
    heads = ["cell", "TTFT", "p90", "min", "max", "bytes", "move", "TTFT / move"]
    heads += ["predicted", "error", "unattrib.", "tokens"]
    rows = [_headline_row(cell) for cell in cells]
    return table(
        "Medians of the time to the first token (TTFT), of the time to move the bytes at the"
        " measured ceiling (move), and of their ratio, run by run",
        heads,
        rows,
        names=[cell["id"] for cell in cells],
        style="headline",
    )


def _headline_row(cell: dict[str, Any]) -> list[Cell]:
    def median(name: str) -> float | None:
        found = cell[name]
        return None if found is None else float(found["median"])

    ttft, predicted = cell["ttft"], cell["prediction"] or {"ttft_s": None, "ttft_error": None}
    equal = '<td class="yes">equal</td>' if cell["tokens_equal"] else '<td class="no">differ</td>'
    return [
        f'<th scope="row">{esc(cell["id"])}</th>',
        number_cell(ttft["median"], "s", "ttft", "num strong"),
        *(number_cell(ttft[name], "s", name) for name in ("p90", "min", "max")),
        number_cell(cell["bytes"], "B", "bytes"),
        number_cell(median("move"), "s", "move"),
        number_cell(median("ratio"), "1", "ratio", "num strong"),
        number_cell(predicted["ttft_s"], "s", "predicted"),
        number_cell(predicted["ttft_error"], "%", "error"),
        number_cell(median("unattributed"), "s", "unattributed"),
        equal,
    ]


def _baseline(baseline: dict[str, Any] | None) -> str:
    if baseline is None:
        return ""
    allowed = shown(baseline["fail_if_slower"], "%")
    rows = [
        [
            f'<th scope="row">{esc(item["id"])}</th>',
            text_cell(verdict, "no" if verdict == "slower" else ""),
            number_cell(item["was_s"], "s", "was"),
            number_cell(item["now_s"], "s", "now"),
            number_cell(item["ratio"], "1", "ratio"),
        ]
        for verdict in ("slower", "unsure", "faster")
        for item in baseline.get(verdict, [])
    ]
    if not rows:
        return f"<p>No cell is slower than in {esc(baseline['file'])} by {esc(allowed)}.</p>"
    caption = f"Against {baseline['file']}, slower by {allowed} at most"
    return table(caption, ["cell", "verdict", "was", "now", "ratio"], rows)


def _roof(cells: list[dict[str, Any]], ident: str) -> str:
    told = [cell for cell in cells if cell["move"] and cell["ttft"]["median"] > 0]
    if not told:
        return ""
    drawn = roofline(told, f"{ident}-roof", "Time to the first token against that of the bytes")
    caption = (
        "Solid: the time to move the bytes at the measured ceiling. Beyond it: what the critical"
        " path waited for, in the mean of the runs; what was waited for while bytes moved is left"
        " out, all stages in one proportion. Of other programs nothing is told: all is"
        " unattributed."
    )
    if len(told) < len(cells):
        caption += f" {len(cells) - len(told)} cells without bytes to move are not shown."
    items = [("move", "time to move the bytes")]
    items += [(f"g-{group}", told) for group, told in GROUPS.items()]
    return f"<h3>How near to the ceiling</h3>{figure_html(drawn, caption, keys(items))}"


def _waterfalls(cells: list[dict[str, Any]], ident: str) -> str:
    told = [cell for cell in cells if median_start(cell) is not None]
    if not told:
        return "<p>No run has a timeline.</p>" if cells else ""
    spans = sum(len(s["timeline"]["stages"]) for c in told for s in c["starts"] if s["timeline"])
    starts = sum(s["timeline"] is not None for c in told for s in c["starts"])
    # A page of many starts would be too large to open: then it has the median ones alone.
    every = starts <= _WATERFALLS and spans <= _SPANS
    said = "The median run of each cell, drawn to the scale of its own."
    said += " The others are under it." if every else f" The other {starts - len(told)} are not"
    said += "" if every else " drawn: there are too many; --run and --trace show any of them."
    parts = [f"<h3>Waterfalls</h3><p>{esc(said)}</p>{legend(client=True)}"]
    for number, cell in enumerate(told):
        median = median_start(cell)
        others = []
        for run, start in enumerate(cell["starts"]):
            if start["timeline"] is None or not (every or run == median):
                continue
            name = f"{cell['id']}, run {run + 1} of {len(cell['starts'])}"
            title = f"{name}: {shown(start['ttft_s'], 's')} to the first token by the clock outside"
            # By `coldframe run` there is no client: the clocks are one.
            client_s = None if cell["through"] == "run" else start["ttft_s"]
            drawn = waterfall(start["timeline"], f"{ident}-w{number}-{run}", title, client_s)
            made = (
                f'<div class="waterfall" data-cell="{esc(cell["id"])}" data-run="{run + 1}">'
                f"{figure_html(drawn, title)}</div>"
            )
            if run == median:
                parts.append(f"<h4>{esc(cell['id'])}</h4>{made}")
            else:
                others.append(made)
        if others:
            more = f"the other {len(others)} runs" if len(others) > 1 else "the other run"
            parts.append(f"<details><summary>{more}</summary>{''.join(others)}</details>")
    return "".join(parts)
