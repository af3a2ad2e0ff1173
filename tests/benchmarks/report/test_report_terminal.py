"""The waterfall in a terminal, and where there is none."""

from __future__ import annotations

import io
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

from coldframe.benchmarks.report.terminal import (
    plain_waterfall,
    show_waterfall,
    terminal_waterfall,
)
from coldframe.runtime.timeline.waterfall import rows_of
from tests.benchmarks.report import drawn


@pytest.mark.parametrize("width", [40, 60, 100, 180])
def test_lines_fit_and_bars_lie_to_scale(width: int) -> None:
    timeline = drawn.a_timeline(1.0)
    lines = plain_waterfall(timeline, width).splitlines()
    assert all(cell_len(line) <= width for line in lines)
    rows = [row for band in rows_of(timeline).values() for row in band]
    assert lines[0].lstrip().startswith("critical path p")
    begin = lines[0].index("critical path") + len("critical path ")
    bars = lines[1 : 1 + len(rows)]
    last = max(span["end_s"] for span in timeline["stages"])
    (decode,) = (i for i, row in enumerate(rows) if row.stage == "decode")
    room = bars[decode].rindex("r", begin, len(bars[decode]) - 8) + 1 - begin
    for row, bar in zip(rows, bars, strict=True):
        cells = bar[begin : begin + room].replace("|", " ")
        letter = "." if row.stage == "waiting" else {"restore": "s"}.get(row.group, row.group[0])
        assert set(cells) <= {" ", letter}
        left, right = row.start_s * room / last, row.end_s * room / last
        assert cells.index(letter) == pytest.approx(left, abs=1.01)
        assert cells.rindex(letter) + 1 == pytest.approx(max(right, left + 1), abs=1.01)
    # Under the line down to it.
    (mark,) = (line for line in lines if "first token" in line)
    column = mark.index("^")
    assert sum(len(bar) > column and bar[column] == "|" for bar in bars) >= len(rows) // 2
    assert "1.00 s" in mark


def test_colours_where_there_is_a_terminal() -> None:
    timeline = drawn.a_timeline(1.0)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=90)
    terminal_waterfall(timeline, console)
    assert "\x1b[38;2;230;159;0m█" in out.getvalue()
    assert "░" in out.getvalue()
    plain = io.StringIO()
    terminal_waterfall(timeline, Console(file=plain, width=90))
    assert plain.getvalue().rstrip() == plain_waterfall(timeline, 90)
    assert "\x1b" not in plain.getvalue()


def test_without_rich_it_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setenv("COLUMNS", "70")
    out = io.StringIO()
    show_waterfall(drawn.a_timeline(1.0), out)
    assert out.getvalue() == plain_waterfall(drawn.a_timeline(1.0), 70) + "\n"


def test_starts_as_they_hardly_are() -> None:
    for cell in drawn.edge_cells():
        for start in cell["starts"]:
            if start["timeline"] is not None:
                text = plain_waterfall(start["timeline"], 80)
                assert "first token" in text
                assert len(text.splitlines()) < 60
    never = {"ttft_s": None, "stages": [], "critical_path": [], "unattributed_s": 0.0}
    assert plain_waterfall(never).splitlines()[-1] == "no first token"
