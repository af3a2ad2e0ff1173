"""Traces against the rules of the trace-event format, by which Perfetto reads them.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.benchmarks.report.runs import chosen_runs, runs_of
from coldframe.benchmarks.report.trace import chrome_trace
from coldframe.loader.errors import RequestError
from tests.benchmarks.report import drawn


def check(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Holds a trace against the format's rules.

    Returns:
        The complete events of each process by its name.
    """
    trace = json.loads(json.dumps(trace, allow_nan=False))
    names: dict[int, str] = {}
    rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    for event in trace["traceEvents"]:
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        # 0 is the idle task's, and no event of a trace is.
        assert event["pid"] > 0
        assert event["tid"] > 0
        if event["ph"] == "M":
            if event["name"] == "process_name":
                assert (
                    names.setdefault(event["pid"], event["args"]["name"]) == event["args"]["name"]
                )
            continue
        assert event["ts"] >= 0
        if event["ph"] == "i":
            assert event["s"] in ("g", "p", "t")
            continue
        assert event["ph"] == "X"
        assert event["dur"] >= 0
        assert isinstance(event.get("args", {}), dict)
        # Perfetto keeps whole nanoseconds.
        start, length = round(event["ts"] * 1000), round(event["dur"] * 1000)
        rows.setdefault((event["pid"], event["tid"]), []).append((start, start + length))
        found.setdefault(names[event["pid"]], []).append(event)
    assert len({tid: pid for pid, tid in rows}) == len(rows)
    for row in rows.values():
        open_: list[int] = []
        for start, end in sorted(row, key=lambda each: (each[0], -each[1])):
            while open_ and open_[-1] <= start:
                open_.pop()
            assert not open_ or end <= open_[-1], "neighbours of one row cross"
            open_.append(end)
    return found


def test_all_runs_are_processes_of_one_trace() -> None:
    cells = [drawn.cold_cell("a", [drawn.a_timeline(1.0), drawn.a_timeline(2.0)])]
    document = drawn.cold([*cells, *drawn.edge_cells()])
    runs = runs_of(document)
    trace = chrome_trace(runs)
    found = check(trace)
    for run in runs:
        path = found[f"{run.label} critical path"]
        assert sum(event["dur"] for event in path) == pytest.approx(run.timeline["ttft_s"] * 1e6)
        for span in run.timeline["stages"]:
            assert f"{run.label} {span['process']}" in found
    spans = sum(len(run.timeline["stages"]) + len(run.timeline["critical_path"]) for run in runs)
    assert sum(map(len, found.values())) == spans
    firsts = [e["ts"] for e in trace["traceEvents"] if e["ph"] == "i"]
    assert firsts == [pytest.approx(run.timeline["ttft_s"] * 1e6) for run in runs]


SPANS = st.tuples(
    st.sampled_from(["front", "memory", "a <b>"]),
    st.text(max_size=5),
    st.floats(0, 2),
    st.floats(0, 1),
)


@settings(max_examples=40)
@given(st.lists(SPANS, max_size=25), st.floats(0.001, 50))
def test_rows_nest_whatever_the_spans(
    spans: list[tuple[str, str, float, float]], ttft: float
) -> None:
    told = [(process, name, start, start + length) for process, name, start, length in spans]
    told.append(("prefill-0", "prefill[head]", 0.5, 1.0))
    timeline = drawn.a_timeline(ttft, told)
    document = drawn.cold([drawn.cold_cell("c", [timeline])])
    found = check(chrome_trace(runs_of(document)))
    assert sum(map(len, found.values())) == len(timeline["stages"]) + len(timeline["critical_path"])


def test_runs_are_named_by_cell_and_number() -> None:
    cells = [
        drawn.cold_cell("a:1", [drawn.a_timeline(t) for t in (1.0, 3.0, 2.0)]),
        drawn.cold_cell("b", [None, None, None], path=[]),
    ]
    documents = [drawn.cold(cells), {**drawn.rows(), "kind": "rows"}]
    assert [run.label for run in chosen_runs(documents, None)] == ["a:1 #1", "a:1 #2", "a:1 #3"]
    (median,) = chosen_runs(documents, "a:1")
    assert (median.number, median.median) == (3, True)
    (second,) = chosen_runs(documents, "a:1:2")
    assert (second.number, second.median) == (2, False)
    for wrong in ("b", "a:1:4", "a", ""):
        with pytest.raises(RequestError, match="no such run"):
            chosen_runs(documents, wrong)
