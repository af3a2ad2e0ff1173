"""The report in a browser: what is drawn against the documents, at two widths.

The picture is kept in `build/pictures/`, or where COLDFRAME_PICTURES says.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from coldframe.benchmarks.document import figure
from coldframe.benchmarks.harness import cold_start
from coldframe.benchmarks.report.markup import shown
from coldframe.benchmarks.report.page import report_page, write_report
from coldframe.benchmarks.report.roofline import beyond
from coldframe.loader.errors import PlatformError
from tests.benchmarks.report import drawn
from tests.runtime.gateway.browser import chromium

PICTURES = Path(__file__).parents[3] / "build" / "pictures"

_BOXES = """
return [...document.querySelectorAll(arguments[0])].map(e => {
  const r = e.getBoundingClientRect();
  const around = e.closest('[data-run], g[data-cell], g[data-way]');
  return {...e.dataset, x: r.x, y: r.y, width: r.width, height: r.height, text: e.textContent,
    kind: e.getAttribute('class'), around: around ? {...around.dataset} : {}};
});
"""

_OUTSIDE = """
const found = [];
for (const svg of document.querySelectorAll('figure svg')) {
  const box = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll('text')) {
    const r = text.getBoundingClientRect();
    if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1
        || r.bottom > box.bottom + 1) found.push(svg.id + ': ' + text.textContent);
  }
}
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('svg, .scroll') || e.matches('title')) continue;
  const r = e.getBoundingClientRect();
  if (r.right > document.documentElement.clientWidth + 1) found.push(e.tagName + e.textContent);
}
if (document.documentElement.scrollWidth > document.documentElement.clientWidth)
  found.push('the page');
return found;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def documents(demo_model: Callable[..., Path]) -> list[dict[str, Any]]:
    """A real start and many that never were."""
    real = cold_start(demo_model(), prompt_ids=[5, 6, 7], tokens=2)
    names = ("ttft_s", "stages", "critical_path", "unattributed_s")
    timeline = {name: real[name] for name in names}
    cells = [drawn.cold_cell("fresh/cold/disk/native/run", [timeline]), *drawn.edge_cells()]
    live, simulated = drawn.played(1, 3, 150), drawn.played(2, 3, 150)
    documents = [drawn.cold(cells), drawn.replay(live, simulated), drawn.advise(), drawn.rows()]
    return [*documents, drawn.serve(), drawn.handoff()]


@pytest.fixture(scope="module")
def page(
    browser: WebDriver, documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> WebDriver:
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(documents, file)
    shape(browser, 1280)
    browser.get(file.as_uri())
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    return browser


def shape(browser: WebDriver, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def boxes(page: WebDriver, selector: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = page.execute_script(_BOXES, selector)
    return found


def test_bars_lie_where_their_spans_do(page: WebDriver, documents: list[dict[str, Any]]) -> None:
    bars, steps = boxes(page, "rect.bar"), boxes(page, "rect.step")
    marks = boxes(page, ".waterfall line.first")
    clients = boxes(page, ".waterfall line.client")
    for cell in documents[0]["cells"]:
        for number, start in enumerate(cell["starts"]):
            timeline = start["timeline"]
            if timeline is None:
                continue
            key = {"cell": cell["id"], "run": str(number + 1)}
            mine = [bar for bar in bars if bar["around"] == key]
            path = [step for step in steps if step["around"] == key]
            (mark,) = (line for line in marks if line["around"] == key)
            assert float(mark["ttft"]) == timeline["ttft_s"]
            origin = path[0]["x"]
            scale = (mark["x"] + mark["width"] / 2 - origin) / timeline["ttft_s"]
            there = [line for line in clients if line["around"] == key]
            assert len(there) == (cell["through"] == "http")
            for line in there:
                assert float(line["client"]) == start["ttft_s"]
                place = origin + scale * start["ttft_s"]
                assert line["x"] + line["width"] / 2 == pytest.approx(place, abs=1)
            end = 1.5 * timeline["ttft_s"] if cell["id"] == "long tail" else float("inf")
            for bar in [*mine, *path]:
                left, right = float(bar["start"]), min(end, float(bar["end"]))
                assert bar["x"] == pytest.approx(origin + scale * left, abs=1)
                assert bar["width"] == pytest.approx(max(1, scale * (right - left)), abs=1)
            assert len(path) == len(timeline["critical_path"])
            assert sum(int(bar.get("count", 1)) for bar in mine) == len(timeline["stages"])
            told = {(s["process"], s["name"], s["start_s"], s["end_s"]) for s in timeline["stages"]}
            single = [bar for bar in mine if "count" not in bar]
            for bar in single:
                who = (bar["process"], bar["name"], float(bar["start"]), float(bar["end"]))
                assert who in told
            waits = sum("waits_for" in s for s in timeline["stages"])
            if len(single) == len(timeline["stages"]):
                assert sum("wait" in bar["kind"].split() for bar in mine) == waits
            else:
                assert len(mine) <= 700


def test_boxes_are_numpys_quartiles(page: WebDriver, documents: list[dict[str, Any]]) -> None:
    cells = {cell["id"]: cell["ttft"] for cell in documents[0]["cells"]}
    drawn_boxes = boxes(page, "#d0-cold .boxplot rect.box")
    assert [box["around"]["cell"] for box in drawn_boxes] == list(cells)
    circles, medians = boxes(page, "#d0-cold circle.run"), boxes(page, "#d0-cold line.median")
    for box, median in zip(drawn_boxes, medians, strict=True):
        runs = cells[box["around"]["cell"]]["runs"]
        q1, middle, q3 = np.percentile(runs, [25, 50, 75])
        assert (float(box["q1"]), float(box["q3"])) == pytest.approx((q1, q3))
        assert float(median["value"]) == pytest.approx(middle)
        points = [c for c in circles if c["around"] == box["around"]]
        assert [float(c["value"]) for c in points] == runs
        # Places and values are in the same order, here as there.
        centres = [c["x"] + c["width"] / 2 for c in points]
        assert np.argsort(centres, kind="stable").tolist() == np.argsort(runs).tolist()
        if len(runs) > 1:
            ends = (box["x"], box["x"] + box["width"])
            assert min(centres) - 1 <= ends[0] <= ends[1] <= max(centres) + 1


def test_tables_say_what_the_documents_do(page: WebDriver, documents: list[dict[str, Any]]) -> None:
    cells = documents[0]["cells"]
    rows = page.execute_script(
        "return [...document.querySelectorAll('table.headline tbody tr')].map(r => [r.dataset.row,"
        " [...r.querySelectorAll('td[data-name]')].map(c => [c.dataset.name, c.dataset.value,"
        " c.textContent])])"
    )
    assert [row[0] for row in rows] == [cell["id"] for cell in cells]
    for cell, (_, found) in zip(cells, rows, strict=True):
        prediction = cell["prediction"] or {"ttft_s": None, "ttft_error": None}
        expected = {
            "bytes": (cell["bytes"], "B"),
            "predicted": (prediction["ttft_s"], "s"),
            "error": (prediction["ttft_error"], "%"),
            **{name: ((cell["ttft"])[name], "s") for name in ("p90", "min", "max")},
            "ttft": (cell["ttft"]["median"], "s"),
        }
        for name, unit in (("move", "s"), ("ratio", "1"), ("unattributed", "s")):
            expected[name] = (cell[name] and cell[name]["median"], unit)
        assert len(found) == len(expected)
        for name, exact, text in found:
            value, unit = expected[name]
            assert (exact is None) == (value is None)
            assert exact is None or float(exact) == value
            assert text == shown(value, unit)
    every = page.execute_script(
        "return [...document.querySelectorAll('#d1-replay td[data-value]')].map(c =>"
        " [c.dataset.name, Number(c.dataset.value)])"
    )
    for name, value in every:
        way, _, key = name.partition(" ")
        source = documents[1][way]
        assert value == (source[key] if key in source else source["ttft"][key])


def test_the_roofline_is_the_ttft_in_sum(page: WebDriver, documents: list[dict[str, Any]]) -> None:
    parts = boxes(page, ".roof rect.part")
    told = [cell for cell in documents[0]["cells"] if cell["move"]]
    assert {part["around"]["cell"] for part in parts} == {cell["id"] for cell in told}
    for cell in told:
        mine = [part for part in parts if part["around"]["cell"] == cell["id"]]
        ttft = cell["ttft"]["median"]
        assert float(mine[0]["value"]) == cell["move"]["median"]
        assert sum(float(part["value"]) for part in mine) == pytest.approx(ttft, rel=0.01)
        whole = sum(part["width"] for part in mine)
        for part in mine:
            share = float(part["value"]) / ttft
            assert part["width"] == pytest.approx(share * whole, abs=1.5)
        if not cell["path"]:
            assert [part["group"] for part in mine] == ["move", "unattributed"]


def test_the_replay_has_each_state_and_each_request(
    page: WebDriver, documents: list[dict[str, Any]]
) -> None:
    document = documents[1]
    stays, ticks = boxes(page, "rect.stay"), boxes(page, "rect.tick")
    origin = min(stay["x"] for stay in stays)
    scale = (max(stay["x"] + stay["width"] for stay in stays) - origin) / 300
    for way in ("live", "simulated"):
        for model, states in document[way]["states"].items():
            lane = {"model": model, "way": way}
            mine = [stay for stay in stays if stay["around"] == lane]
            assert [s["state"] for s in mine] == [s["state"] for s in states]
            for found, state in zip(mine, states, strict=True):
                assert found["x"] == pytest.approx(origin + scale * state["start_s"], abs=1)
                length = state["end_s"] - state["start_s"]
                assert found["width"] == pytest.approx(scale * length, abs=1)
            asked = [r for r in document[way]["asked"] if r["model"] == model]
            mine = [tick for tick in ticks if tick["around"] == lane]
            for met in ("zero", "parked", "warm"):
                there = sum(int(tick["count"]) for tick in mine if tick["from"] == met)
                assert there == sum(request["from"] == met for request in asked)
            for tick in mine:
                place = origin + scale * float(tick["at"])
                assert tick["x"] + tick["width"] / 2 == pytest.approx(place, abs=1)
    dots = page.execute_script(
        "return [...document.querySelectorAll('#d1-replay-scatter circle.dot')]"
        ".map(c => [Number(c.dataset.x), Number(c.dataset.y)])"
    )
    both = [*document["live"]["asked"], *document["simulated"]["asked"]]
    assert dots == [[request["at_s"], request["ttft_s"]] for request in both]


def test_the_choice_to_take_stands_out(page: WebDriver, documents: list[dict[str, Any]]) -> None:
    (row,) = boxes(page, "tr.taken")
    assert row["row"] == documents[2]["take"]
    assert len(boxes(page, "#d2-advise-cost circle.dot.star")) == 1
    bubbles = boxes(page, "#d2-advise-cost circle.bubble")
    assert len(bubbles) == len(documents[2]["choices"])
    centres = [complex(b["x"], b["y"]) for b in bubbles]
    pairs = [(a, b) for n, a in enumerate(centres) for b in centres[:n]]
    assert all(abs(a - b) > 20 for a, b in pairs)


def test_loads_are_points_in_their_order(page: WebDriver, documents: list[dict[str, Any]]) -> None:
    loads = documents[4]["loads"]
    found = page.execute_script(
        "return ['ttft', 'itl', 'e2e', 'goodput'].map(n => [n, [...document.querySelectorAll("
        "`#d4-serve-${n} g.series`)].map(g => [g.dataset.name, [...g.querySelectorAll('.dot')].map("
        "c => [Number(c.dataset.x), Number(c.dataset.y)])])])"
    )
    for name, series in found:
        for told, points in series:
            way, _, quantile = told.partition(" ")
            mine = sorted((x for x in loads if x["way"] == way), key=lambda x: float(x["rate"]))
            assert points == [
                [load["rate"], part[quantile or "share"]]
                for load in mine
                if (part := load["all"][name]) is not None
            ]
        assert [told for told, _ in series] == (
            ["apart", "together"]
            if name == "goodput"
            else [f"{way} {q}" for way in ("apart", "together") for q in ("p50", "p99")]
        )


def test_handoffs_are_as_long_as_they_took(
    page: WebDriver, documents: list[dict[str, Any]]
) -> None:
    bars = boxes(page, "rect.handoff")
    cells = {cell["id"]: cell for cell in documents[5]["cells"]}
    longest = max(cell["second"]["median"] for cell in cells.values())
    scale = max(bar["width"] for bar in bars) / longest
    assert len(bars) == 2 * len(cells)
    for bar in bars:
        cell = cells[bar["cell"]]
        assert float(bar["value"]) == cell[bar["name"]]["median"]
        length = min(float(bar["value"]), cell["second"]["median"])
        assert bar["width"] == pytest.approx(scale * length, abs=1)


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_runs_out_of_its_box(page: WebDriver, width: int) -> None:
    shape(page, width)
    try:
        assert page.execute_script(_OUTSIDE) == []
    finally:
        shape(page, 1280)


def test_it_needs_nothing_runs_nothing_and_is_kept(page: WebDriver) -> None:
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.execute_script("return document.scripts.length") == 0
    assert page.execute_script("return typeof window.pwned") == "undefined"
    assert page.get_log("browser") == []
    for svg in page.execute_script(
        "return [...document.querySelectorAll('svg[role=img]')].map(s => [s.id,"
        " s.getAttribute('aria-labelledby').split(' ').map(i => document.getElementById(i)"
        ".textContent)])"
    ):
        assert all(svg[1]), svg[0]
    folder = Path(os.environ.get("COLDFRAME_PICTURES") or PICTURES)
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        shot = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        picture = base64.b64decode(shot["data"])
        assert picture.startswith(b"\x89PNG")
        (folder / f"report-{scheme}.png").write_bytes(picture)


# -- without a browser ----------------------------------------------------------------------------


def test_what_lies_beyond_the_bytes_is_divided_by_the_runs_own_paths() -> None:
    # Each run waits for something else: the medians of the parts are half of the whole.
    runs = {"imports": [0.9, 0.1, 0.1], "prefill": [0.1, 0.9, 0.1], "kv_alloc": [0.0, 0.0, 0.8]}
    path = [
        {"process": "prefill-0", "name": name, "seconds": figure(seconds, "s")}
        for name, seconds in runs.items()
    ]
    cell = {"ttft": figure([1.0] * 3, "s"), "move": figure([0.1] * 3, "s"), "path": path}
    found = {group: (drawn, taken) for group, drawn, taken in beyond(cell)}
    third = pytest.approx(1.1 / 3)
    assert {group: taken for group, (_, taken) in found.items()} == {
        "provision": third,
        "engine": pytest.approx(0.8 / 3),
        "request": third,
    }
    assert sum(drawn for drawn, _ in found.values()) == pytest.approx(0.9)
    assert beyond({**cell, "path": []}) == [("unattributed", 0.9, 0.0)]


def test_the_same_documents_make_the_same_page(documents: list[dict[str, Any]]) -> None:
    again = json.loads(json.dumps(documents))
    page = report_page([{"kind": "rows", **document} for document in documents])
    assert page == report_page([{"kind": "rows", **document} for document in again])
    assert "://" not in page
    assert not re.search(r"<(script|link rel=\"style|img|iframe)|url\(|@import", page)


def test_many_cells_make_a_page_that_opens() -> None:
    timelines = [drawn.a_timeline(1 + n / 10) for n in range(5)]
    cells = [drawn.cold_cell(f"cell {n}", timelines) for n in range(40)]
    started = time.process_time()
    page = report_page([drawn.cold(cells)])
    assert time.process_time() - started < 30
    assert len(page) < 6_000_000
    assert page.count('class="waterfall"') == 40
    assert "The other 160 are not drawn" in page


def test_empty_documents_are_drawn() -> None:
    nobody = drawn.played(0, 1, 0)
    documents = [drawn.cold([]), drawn.replay(nobody, None), drawn.replay(None, None)]
    documents.append({**drawn.advise(), "choices": []})
    page = report_page(documents)
    assert page.count("<section") == 4


def test_a_baseline_is_told_cell_by_cell() -> None:
    slower = [{"id": "a <cell>", "was_s": 1.0, "now_s": 1.25, "ratio": 1.25}]
    baseline = {"file": "was.json", "fail_if_slower": 0.1, "slower": slower, "missing": []}
    page = report_page([{**drawn.cold([]), "baseline": baseline}])
    assert "Against was.json, slower by 10.0 % at most" in page
    assert "a &lt;cell&gt;" in page
    assert '<td class="num" data-name="now" data-value="1.25">1.25 s</td>' in page
    none = report_page([{**drawn.cold([]), "baseline": {**baseline, "slower": []}}])
    assert "No cell is slower than in was.json by 10.0 %." in none


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="nowhere"):
        write_report([drawn.rows()], tmp_path / "nowhere" / "r.html")
