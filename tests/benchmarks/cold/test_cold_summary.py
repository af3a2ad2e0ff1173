"""Runs to a cell of the document, its figures held against NumPy's."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.benchmarks.cold.contender import Outcome
from coldframe.benchmarks.cold.explain import path_of
from coldframe.benchmarks.cold.matrix import Cell
from coldframe.benchmarks.cold.prediction import (
    predicted,
    predicted_memory,
    predicted_ttft,
    unpredicted,
)
from coldframe.benchmarks.cold.starts import Start
from coldframe.benchmarks.cold.summary import (
    THROTTLE,
    Measured,
    Rival,
    cell_document,
    rival_document,
)
from coldframe.benchmarks.document import SCHEMA

SECONDS = st.floats(0.01, 100)
COLD = Cell("fresh", "cold", "disk", None, "native", "http")
TOKENS = (7, 8, 9)
DEFINITIONS = json.loads(SCHEMA.read_text())["$defs"]
CELL = jsonschema.Draft202012Validator({"$ref": "#/$defs/cold_cell", "$defs": DEFINITIONS})


def timeline(scale: float) -> dict[str, Any]:
    stages = [
        ("interpreter", "front", 0.0, 0.1),
        ("weight_read", "memory", 0.1, 0.6),
        ("imports", "prefill-0", 0.1, 0.5),
        ("stage_ready[0]", "memory", 0.6, 0.6),
        ("prefill[0]", "prefill-0", 0.6, 0.9),
    ]
    steps = [
        ("interpreter", "front", 0.0, 0.1),
        ("imports", "prefill-0", 0.1, 0.5),
        ("weight_read", "memory", 0.5, 0.6),
        ("prefill[0]", "prefill-0", 0.6, 0.9),
        ("unattributed", "", 0.9, 1.0),
    ]
    found = [
        [
            {"name": name, "process": process, "start_s": a * scale, "end_s": b * scale}
            for name, process, a, b in each
        ]
        for each in (stages, steps)
    ]
    return {
        "ttft_s": scale,
        "stages": found[0],
        "critical_path": found[1],
        "unattributed_s": 0.1 * scale,
    }


def start(ttft: float, *, tokens: tuple[int, ...] = TOKENS, mapped: bool = False) -> Start:
    said = timeline(ttft * 0.9)
    return Start(ttft, ttft * 1.5, tokens, said, path_of(said, ttft), 10**8, mapped)


def checked(found: dict[str, Any]) -> dict[str, Any]:
    CELL.validate(found)
    return found


@settings(max_examples=25)
@given(st.lists(st.tuples(SECONDS, st.floats(1e6, 1e10)), min_size=1, max_size=12))
def test_a_cell_is_its_runs(runs: list[tuple[float, float]]) -> None:
    measured = Measured(COLD, 10**9, evicted=True, ceiling_how="a raw read")
    measured.starts = [start(ttft) for ttft, _ in runs]
    measured.ceilings = [rate for _, rate in runs]
    found = checked(cell_document(measured, TOKENS))
    ttft = np.array([ttft for ttft, _ in runs])
    move = 10**9 / np.array([rate for _, rate in runs])
    for name, values in (
        ("ttft", ttft),
        ("move", move),
        ("ratio", ttft / move),
        ("last_token", ttft * 1.5),
        ("rate", 10**9 / (0.5 * 0.9 * ttft)),
        ("unattributed", 0.09 * ttft),
    ):
        figure = found[name]
        assert figure["runs"] == pytest.approx(list(values))
        assert figure["median"] == pytest.approx(np.median(values))
        assert figure["p90"] == pytest.approx(np.percentile(values, 90))
        assert (figure["min"], figure["max"]) == pytest.approx((values.min(), values.max()))
    for run, whole in enumerate(ttft):
        assert sum(s["seconds"]["runs"][run] for s in found["path"]) == pytest.approx(whole)
    busy = {(s["process"], s["name"]): s for s in found["stages"]}
    assert busy["memory", "weight_read"]["overlap"]["runs"] == pytest.approx(list(0.36 * ttft))
    beside = busy["prefill-0", "imports"]["beside_weights"]["runs"]
    assert beside == pytest.approx(list(0.36 * ttft))


def test_what_is_throttled_is_held_against_the_slower_of_throttle_and_path() -> None:
    cell = Cell("fresh", "cold", "disk", 1e8, "native", "http")
    measured = Measured(cell, 10**8, ceiling_how="a raw read")
    measured.starts = [start(2.0), start(2.0)]
    measured.ceilings = [2e8, 5e7]
    found = checked(cell_document(measured, TOKENS))
    assert found["ceiling"]["rate"]["runs"] == [1e8, 5e7]
    assert found["ratio"]["runs"] == pytest.approx([2.0, 1.0])
    assert found["ceiling"]["how"] == "the throttle (1 of 2 runs); a raw read (1 of 2 runs)"
    measured.ceilings = [2e8, 3e8]
    assert cell_document(measured, TOKENS)["ceiling"]["how"] == THROTTLE
    measured.ceilings = [9e7, 5e7]
    assert cell_document(measured, TOKENS)["ceiling"]["how"] == "a raw read"
    # Of a page cache there is no ceiling, but the throttle is one.
    measured.ceilings, measured.ceiling_how = [], None
    found = checked(cell_document(measured, TOKENS))
    assert found["move"]["runs"] == [1.0, 1.0]
    assert found["ceiling"]["how"] == THROTTLE


def test_what_was_not_moved_has_no_time_to_move() -> None:
    rests = Measured(Cell("warm", "warm", "disk", None, "native", "http"), 0)
    rests.starts = [Start(0.1, 0.2, TOKENS, None, {("gateway", "queue"): 0.1}, None, False)]
    there = Measured(Cell("fresh", "warm", "disk", None, "native", "http"), 10**9)
    there.starts = [start(1.0, mapped=True)]
    for measured in (rests, there):
        found = checked(cell_document(measured, TOKENS))
        assert [found[name] for name in ("ceiling", "move", "ratio", "rate")] == [None] * 4
    assert checked(cell_document(rests, TOKENS))["clock"] == "request"
    assert checked(cell_document(rests, TOKENS))["memory"] is None
    assert checked(cell_document(there, TOKENS))["mapped"] is True


@pytest.mark.parametrize(
    ("got", "at"), [((7, 8, 1), 2), ((1, 8, 9), 0), ((7, 8), 2), ((7, 8, 9, 9), 3), ((), 0)]
)
def test_other_tokens_are_told_with_their_place(got: tuple[int, ...], at: int) -> None:
    measured = Measured(COLD, 10**9)
    measured.starts = [start(1.0), start(1.0, tokens=got)]
    found = checked(cell_document(measured, TOKENS))
    assert found["tokens_equal"] is False
    assert found["differs"] == {"run": 1, "at": at, "expected": [7, 8, 9], "got": list(got)}
    rival = Rival("fastapi", "http", "cold", 10**9, outcomes=[Outcome(3.0, 4.0, got, None)])
    assert checked(rival_document(rival, TOKENS))["tokens_equal"] is False


def test_another_program_has_a_cell() -> None:
    rival = Rival("vllm", "http", "cold", 10**9, evicted=True, ceiling_how="a raw read")
    rival.outcomes = [Outcome(20.0, 21.0, TOKENS, 5 * 10**8), Outcome(10.0, 11.0, TOKENS, None)]
    rival.ceilings = [1e9, 5e8]
    found = checked(rival_document(rival, TOKENS))
    assert (found["who"], found["id"]) == ("vllm", "vllm/cold/disk/http")
    assert found["ratio"]["runs"] == pytest.approx([20.0, 5.0])
    assert found["memory"] is None  # not of all its runs
    assert found["tokens_equal"] is True


PLAN = {
    "starts": [
        {"tier": "fresh", "cache": "cold", "through": "run", "ttft_s": 1.0, "why": None},
        {"tier": "fresh", "cache": "cold", "through": "http", "ttft_s": 2.0, "why": None},
        {"tier": "restored", "ttft_s": None, "why": "no CRIU"},
        {"tier": "warm", "ttft_s": 0.5, "why": None},
    ],
    "memory": {
        "replica": [
            {"tier": "fresh", "through": "http", "weights": "mapped", "pss": 5},
            {"tier": "fresh", "through": "http", "weights": "copied", "pss": 6},
        ]
    },
}


def test_a_prediction_stands_beside_what_was_measured() -> None:
    measured = Measured(COLD, 10**9, plan={**PLAN, "memory": {"replica": 11 * 10**7}})
    measured.starts = [start(1.0), start(2.5), start(3.0)]
    found = checked(cell_document(measured, TOKENS))["prediction"]
    assert found["ttft_error"] == pytest.approx(2.0 / 2.5 - 1)
    assert found["memory_error"] == pytest.approx(0.1)
    measured.plan = {}
    found = checked(cell_document(measured, TOKENS))["prediction"]
    assert [found[name] for name in ("ttft_s", "memory_bytes", "ttft_error")] == [None] * 3
    assert found["why"]
    measured.plan = None
    assert checked(cell_document(measured, TOKENS))["prediction"] is None


def test_which_prediction_is_a_cells() -> None:
    assert predicted_ttft(PLAN, COLD) == (2.0, None)
    restored = Cell("restored", "warm", "disk", None, "native", "run")
    assert predicted_ttft(PLAN, restored) == (None, "no CRIU")
    warm = Cell("warm", "warm", "disk", None, "native", "http")
    assert predicted_ttft(PLAN, warm) == (0.5, None)
    assert predicted_memory(PLAN, COLD, False) == 6
    assert predicted_memory(PLAN, warm, True) == 5  # it had started fresh
    assert predicted_memory(PLAN, restored, False) is None
    assert predicted_memory({}, COLD, False) is None


def test_the_first_token_is_predicted_where_no_engine_comes_up_beside_it() -> None:
    bridge, alone, rests = (
        Cell(tier, "cold" if tier == "fresh" else "warm", "disk", None, engine, "http")
        for tier, engine in (("fresh", "bridge"), ("fresh", "vllm"), ("warm", "vllm"))
    )
    assert [unpredicted(cell) is None for cell in (COLD, bridge, alone, rests)] == [
        *(True, True, False, True)
    ]
    for cell, ttft_s in ((bridge, 2.0), (rests, 0.5), (alone, None)):
        told = predicted(PLAN, cell, ttft_s=1.0, memory=7.0, mapped=False)
        assert told is not None
        assert (told["ttft_s"], told["memory_bytes"]) == (ttft_s, None)
        assert "vLLM engine" in told["why"]
