"""The picture of a start: well formed whatever the spans are, and bounded however many."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.timeline import Span
from coldframe.runtime.timeline.stage_groups import GROUPS, group_of, stage_of
from coldframe.runtime.timeline.svg import Axis, brief_seconds, fitted, seconds_ticks, width_of
from coldframe.runtime.timeline.timeline import UNATTRIBUTED, Timeline
from coldframe.runtime.timeline.waterfall import WIDTH, rows_of, waterfall

# XML has no place for control characters, and names of stages have none.
TEXT = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc", "Cn"]), max_size=30)
WAITS = st.none() | TEXT
SPAN = st.tuples(TEXT, TEXT, st.integers(0, 10**10), st.integers(0, 10**10), WAITS)


def picture(timeline: dict[str, Any]) -> ElementTree.Element:
    return ElementTree.fromstring(waterfall(timeline, "w", "a <start>"))


def bars(svg: ElementTree.Element) -> list[ElementTree.Element]:
    return [e for e in svg.iter("rect") if e.get("class", "").startswith("bar")]


@settings(max_examples=60)
@given(st.lists(SPAN, max_size=30), st.none() | st.integers(1, 10**10))
def test_every_span_is_drawn_whatever_it_is(
    told: list[tuple[str, str, int, int, str | None]], first_token: int | None
) -> None:
    spans = [Span(n, p, start, start + length, n, w) for n, p, start, length, w in told]
    timeline = Timeline(spans, 0, first_token).to_json()
    svg = picture(timeline)
    assert sum(int(bar.get("data-count", "1")) for bar in bars(svg)) == len(spans)
    for bar in svg.iter("rect"):
        left, width = float(bar.get("x", "nan")), float(bar.get("width", "nan"))
        assert 0 <= left <= left + width <= WIDTH + 1
    titles = [element.text for element in svg.findall("title")]
    assert titles == ["a <start>"]


def test_very_many_spans_are_fewer_bars_and_rows() -> None:
    stages = [
        {
            "name": f"stage-{n % 40}[{n}]",
            "process": f"worker-{n % 3}",
            "start_s": n / 1e6,
            "end_s": n / 1e6 + 5e-7,
        }
        for n in range(20_000)
    ]
    timeline = {"ttft_s": 0.02, "stages": stages, "critical_path": [], "unattributed_s": 0.0}
    svg = picture(timeline)
    drawn = bars(svg)
    assert len(drawn) <= 700
    assert sum(int(bar.get("data-count", "1")) for bar in drawn) == 20_000
    assert all(len(band) <= 14 for band in rows_of(timeline).values())
    assert f"as {len(drawn)} bars" in (svg.findtext("desc") or "")


def test_what_goes_on_behind_the_first_token_is_cut() -> None:
    spans = [Span("prefill[head]", "w", 0, 10**9), Span("decode", "front", 10**9, 90 * 10**9)]
    svg = picture(Timeline(spans, 0, 10**9).to_json())
    assert "ends at 1.50 s" in (svg.findtext("desc") or "")
    places = {bar.get("data-name"): float(bar.get("width", "nan")) for bar in bars(svg)}
    assert places["prefill[head]"] == pytest.approx(2 * places["decode"], abs=0.1)


def test_groups() -> None:
    assert stage_of("prefill[3]") == "prefill"
    told = {
        ("weight_read", "memory"): "weights",
        ("snapshot_read", "snapshot"): "restore",
        ("prefill[3]", "prefill-0"): "request",
        ("kv_alloc", "prefill-0"): "engine",
        ("kv_restore", "prefill-0"): "request",
        ("cuda_context", "prefill-0"): "provision",
        ("weight_fetch", "memory"): "weights",
        ("never heard of", "prefill-0"): "engine",
        (UNATTRIBUTED, ""): UNATTRIBUTED,
    }
    assert {key: group_of(*key) for key in told} == told
    assert set(told.values()) == set(GROUPS)


@given(st.floats(1e-6, 1e6), st.floats(1.1, 1e5), st.booleans())
def test_ticks_are_within_their_axis_and_few(low: float, ratio: float, log: bool) -> None:
    axis = Axis(low if log else 0.0, low * ratio, 10, 500, log)
    ticks = axis.ticks()
    assert ticks == sorted(ticks)
    assert len(ticks) <= 14
    assert all(axis.low * 0.999 <= tick <= axis.high * 1.001 for tick in ticks)
    assert all(10 <= axis.at(tick) <= 500 for tick in ticks)
    if not log:
        labels = seconds_ticks(ticks)
        assert len(set(labels)) == len(ticks) >= 2


def test_texts() -> None:
    told = {0: "0 s", 3.12e-4: "312 µs", 0.096: "96.0 ms", 0.9996: "1.00 s", 9.996: "10.0 s"}
    assert {value: brief_seconds(value) for value in told} == told
    assert brief_seconds(1234) == "1234 s"
    assert fitted("short", 100) == "short"
    assert fitted("a long name of a stage", 60).endswith("…")
    assert width_of(fitted("a long name of a stage", 60)) <= 60
    assert fitted("anything", 1) == ""
