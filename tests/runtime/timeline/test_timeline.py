"""The critical path of hand-made starts, and the timeline as a table, a trace and a page."""

from __future__ import annotations

import json
from collections import defaultdict
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.errors import PlatformError
from coldframe.loader.timeline import Span
from coldframe.runtime.timeline.export import chrome_trace, html_page, write
from coldframe.runtime.timeline.text import render
from coldframe.runtime.timeline.timeline import UNATTRIBUTED, PathStep, Timeline

MS = 1_000_000
EXEC = 5_000 * MS
WORKER = "prefill-0"


def span(process: str, name: str, start: float, end: float, waits_for: str | None = None) -> Span:
    """A span, in milliseconds from the exec on."""
    start_ns, end_ns = EXEC + int(start * MS), EXEC + int(end * MS)
    return Span(name, process, start_ns, end_ns, None, waits_for)


def path(timeline: Timeline) -> list[tuple[str, str, float, float]]:
    return [
        (s.process, s.name, (s.start_ns - EXEC) / MS, (s.end_ns - EXEC) / MS)
        for s in timeline.critical_path()
    ]


def made(*spans: Span, first_token: float = 100) -> Timeline:
    return Timeline(spans, EXEC, EXEC + int(first_token * MS))


HEAD = span(WORKER, "prefill[head]", 90, 100)


def a_start() -> Timeline:
    """A start as they are: everything at once, the prefill behind the weights."""
    return made(
        span("front", "interpreter", 0, 20),
        span("front", "process_spawn", 10, 11),
        span("memory", "interpreter", 11, 16),
        span("memory", "imports", 16, 24),
        span("memory", "plan", 25, 27),
        span("memory", "weight_read", 27, 88),
        span("memory", "stage_ready[0]", 27, 60),
        span("memory", "stage_ready[1]", 60, 88),
        span("front", "process_spawn", 20, 21),
        span(WORKER, "interpreter", 21, 30),
        span(WORKER, "imports", 30, 50),
        span(WORKER, "tokenizer", 33, 56),
        span(WORKER, "attach", 50, 55, "weights"),
        span(WORKER, "kv_alloc", 57, 58),
        span(WORKER, "wait", 58, 61, "stage_ready[0]"),
        span(WORKER, "prefill[embedding]", 61, 63),
        span(WORKER, "wait", 63, 88.5, "stage_ready[1]"),
        span(WORKER, "prefill[head]", 88.5, 95),
        span("decode-1", "imports", 30, 80),
        first_token=96,
    )


def test_each_moment_belongs_to_what_the_first_token_waits_for() -> None:
    assert path(a_start()) == [
        ("front", "interpreter", 0, 10),
        ("front", "process_spawn", 10, 11),
        ("front", "interpreter", 11, 20),
        ("front", "process_spawn", 20, 21),
        (WORKER, "interpreter", 21, 30),
        (WORKER, "imports", 30, 50),
        # The main thread waits; its own second thread has the tokenizer to load still.
        (WORKER, "tokenizer", 50, 55),
        ("memory", "stage_ready[0]", 55, 57),
        (WORKER, "kv_alloc", 57, 58),
        ("memory", "stage_ready[0]", 58, 60),
        ("memory", "stage_ready[1]", 60, 61),
        # Weights count only while the worker waits for them.
        (WORKER, "prefill[embedding]", 61, 63),
        ("memory", "stage_ready[1]", 63, 88),
        # The news is on its way.
        ("", UNATTRIBUTED, 88, 88.5),
        (WORKER, "prefill[head]", 88.5, 95),
        ("", UNATTRIBUTED, 95, 96),
    ]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["front", "memory", WORKER, "decode-1"]),
            st.sampled_from(["imports", "weight_read", "tokenizer", "wait", "prefill[head]"]),
            st.integers(-20, 130),
            st.integers(0, 60),
            st.sampled_from([None, None, "weights", "request"]),
        ),
        max_size=12,
    )
)
def test_the_path_has_no_gaps_and_sums_to_the_first_token(
    raw: list[tuple[str, str, int, int, str | None]],
) -> None:
    timeline = made(*(span(p, n, start, start + length, w) for p, n, start, length, w in raw))
    steps = timeline.critical_path()
    assert steps[0].start_ns == EXEC
    assert steps[-1].end_ns == timeline.first_token_ns
    assert all(a.end_ns == b.start_ns for a, b in pairwise(steps))
    assert all((a.name, a.process) != (b.name, b.process) for a, b in pairwise(steps))
    assert all(step.start_ns < step.end_ns for step in steps)
    assert sum(step.seconds for step in steps) == pytest.approx(0.1)
    names = {(s.name, s.process) for s in timeline.spans} | {(UNATTRIBUTED, "")}
    assert {(step.name, step.process) for step in steps} <= names
    render(timeline)
    check_page(html_page(timeline))
    check_trace(timeline)


def test_what_the_worker_computes_is_its_own() -> None:
    timeline = made(span("memory", "weight_read", 0, 100), span(WORKER, "prefill[3]", 40, 90), HEAD)
    assert path(timeline)[-2:] == [
        (WORKER, "prefill[3]", 40, 90),
        (WORKER, "prefill[head]", 90, 100),
    ]


def test_a_wait_for_weights_belongs_to_the_memory_service() -> None:
    timeline = made(
        span("memory", "weight_read", 0, 80),
        span("memory", "stage_ready[0]", 0, 30),
        span("front", "imports", 0, 80),
        span(WORKER, "wait", 10, 60, "stage_ready[0]"),
        span(WORKER, "prefill[0]", 60, 90),
        HEAD,
    )
    waited = [step for step in path(timeline) if 10 <= step[2] < 60]
    assert {process for process, *_ in waited} == {"memory"}


def test_a_wait_for_the_request_belongs_to_the_front() -> None:
    timeline = made(
        span("memory", "weight_read", 0, 80),
        span("front", "imports", 0, 50),
        span(WORKER, "queue", 10, 60, "request"),
        span(WORKER, "prefill[0]", 60, 90),
        HEAD,
    )
    assert ("front", "imports", 0, 50) in path(timeline)
    assert ("memory", "weight_read", 50, 60) in path(timeline)


def test_a_restore_belongs_to_what_is_done_with_the_image() -> None:
    timeline = made(
        span("front", "interpreter", 0, 30),
        span("snapshot", "interpreter", 20, 25),
        span("snapshot", "snapshot_check", 35, 40),
        span("snapshot", "snapshot_read", 40, 60),
        span("memory", "weight_read", 35, 70),
        span(WORKER, "snapshot_restore", 30, 80),
        span(WORKER, "hooks", 80, 85),
        # Another clone is made while this one computes: nothing waits for that.
        span("snapshot", "snapshot_read", 86, 95),
        HEAD,
    )
    assert path(timeline) == [
        ("front", "interpreter", 0, 30),
        (WORKER, "snapshot_restore", 30, 35),
        ("snapshot", "snapshot_check", 35, 40),
        ("snapshot", "snapshot_read", 40, 60),
        (WORKER, "snapshot_restore", 60, 80),
        (WORKER, "hooks", 80, 85),
        ("", UNATTRIBUTED, 85, 90),
        (WORKER, "prefill[head]", 90, 100),
    ]


def test_other_workers_do_not_count() -> None:
    timeline = made(span("decode-1", "imports", 0, 90), HEAD)
    assert path(timeline) == [("", UNATTRIBUTED, 0, 90), (WORKER, "prefill[head]", 90, 100)]
    assert timeline.unattributed_s() == pytest.approx(0.09)


def test_the_path_follows_the_worker_that_made_the_token() -> None:
    # The first prefill worker died, and its successor began again.
    timeline = made(
        span(WORKER, "prefill[0]", 0, 40),
        span("prefill-2", "prefill[0]", 50, 80),
        span("prefill-2", "prefill[head]", 80, 100),
    )
    assert path(timeline) == [
        ("", UNATTRIBUTED, 0, 50),
        ("prefill-2", "prefill[0]", 50, 80),
        ("prefill-2", "prefill[head]", 80, 100),
    ]


def test_without_a_first_token_there_is_no_path() -> None:
    timeline = Timeline([span("front", "interpreter", 0, 20)], EXEC, None)
    assert timeline.critical_path() == []
    assert timeline.to_json()["ttft_s"] is None
    assert render(timeline).endswith("no first token")
    check_page(html_page(timeline))


def test_when_the_last_weight_was_in() -> None:
    assert a_start().last_stage_ready_ns() == EXEC + 88 * MS
    # Mapped weights have no stages of their own.
    mapped = made(span("memory", "weight_read", 27, 28))
    assert mapped.last_stage_ready_ns() == EXEC + 28 * MS
    assert made(HEAD).last_stage_ready_ns() is None


def test_json_is_in_seconds_from_the_exec_on() -> None:
    document = json.loads(json.dumps(a_start().to_json()))
    assert document["ttft_s"] == pytest.approx(0.096)
    stages = {(s["process"], s["name"]): s for s in document["stages"]}
    assert stages["memory", "weight_read"]["start_s"] == pytest.approx(0.027)
    assert stages["memory", "weight_read"]["end_s"] == pytest.approx(0.088)
    assert "waits_for" not in stages["memory", "weight_read"]
    assert stages[WORKER, "attach"]["waits_for"] == "weights"
    assert [s["start_s"] for s in document["stages"]] == sorted(
        s["start_s"] for s in document["stages"]
    )
    total = sum(s["end_s"] - s["start_s"] for s in document["critical_path"])
    assert total == pytest.approx(document["ttft_s"])


def test_the_table_has_a_row_for_each_stage_and_the_shares_add_up() -> None:
    lines = render(a_start()).splitlines()
    (row,) = [line for line in lines if "stage_ready x2" in line]
    assert row.split()[:7] == ["memory", "stage_ready", "x2", "27", "ms", "61", "ms"]
    assert not any("attach" in line for line in lines)  # waits are not work
    shares = [float(line.split("%")[0].split()[-1]) for line in lines if " % " in line]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert shares == sorted(shares, reverse=True)
    assert "first token after 96 ms" in "\n".join(lines)


def test_files(tmp_path: Path) -> None:
    timeline = a_start()
    for name in ("a.html", "a.trace.json", "a.json"):
        write(timeline, str(tmp_path / name))
    check_page((tmp_path / "a.html").read_text())
    assert json.loads((tmp_path / "a.trace.json").read_text()) == chrome_trace(timeline)
    assert json.loads((tmp_path / "a.json").read_text()) == timeline.to_json()
    with pytest.raises(PlatformError, match="nowhere"):
        write(timeline, str(tmp_path / "nowhere" / "a.html"))


def test_the_trace() -> None:
    check_trace(a_start())


def check_trace(timeline: Timeline) -> None:
    """The trace is what the trace-event format asks for, with all spans and the path in it."""
    events = json.loads(json.dumps(chrome_trace(timeline)))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    firsts: list[float] = []
    rows: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    seen: dict[str, int] = defaultdict(int)
    for event in events:
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["pid"] > 0
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name")
            continue
        if event["ph"] == "i":
            assert event["s"] == "p"
            firsts.append(event["ts"])
            continue
        assert event["ph"] == "X"
        assert event["dur"] >= 0
        seen[names[event["pid"]]] += 1
        rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    ttft = timeline.to_json()["ttft_s"]
    assert firsts == ([] if ttft is None else [pytest.approx(ttft * 1e6)])
    assert seen.pop("critical path") == len(timeline.critical_path())
    counts: dict[str, int] = defaultdict(int)
    for each in timeline.spans:
        counts[each.process] += 1
    assert seen == counts
    for row in rows.values():  # viewers take what overlaps in one row to be nested
        for (start, end), (later, its_end) in pairwise(sorted(row, key=lambda e: (e[0], -e[1]))):
            assert later >= end - 1e-3 or its_end <= end + 1e-3, (start, end, later, its_end)


class Page(HTMLParser):
    """Takes the page apart; each element is closed in its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.bars = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.bars += tag == "rect" and any(
            name == "class" and str(value).startswith(("bar", "step")) for name, value in attrs
        )
        if tag not in ("meta",):
            self.open.append(tag)
        assert tag != "script"
        for name, value in attrs:
            assert name not in ("src", "href"), "something from elsewhere"
            assert value is None or "<" not in value or name.startswith("data-")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("rect", "line")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_page(text: str) -> Page:
    assert text.startswith("<!doctype html>")
    assert "://" not in text
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_needs_nothing_from_elsewhere() -> None:
    timeline = a_start()
    page = check_page(html_page(timeline))
    assert page.bars == len(timeline.spans) + len(timeline.critical_path())
    assert "first token 96.0 ms" in page.texts
    assert {WORKER, "kv_alloc", "stage_ready x2"} <= set(page.texts)


def test_names_are_escaped_on_the_page() -> None:
    text = html_page(made(span("<front>", "a & b", 0, 50), HEAD))
    assert "<front>" not in text
    page = check_page(text)
    assert {"<front>", "a & b"} <= set(page.texts)


def test_steps_know_their_length() -> None:
    assert PathStep("a", "b", 0, 1_500_000_000).seconds == 1.5
