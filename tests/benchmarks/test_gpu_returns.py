"""Figures about what comes back - captured steps, contexts, images - from what was seen of it."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.benchmarks.gpu import archived, resident, restored
from coldframe.benchmarks.gpu.correctness import RETURNING, files_of
from coldframe.benchmarks.gpu.decode import bandwidth, captures, together_rate
from coldframe.benchmarks.gpu.replicas import Answer
from coldframe.benchmarks.gpu.report import LeftOut
from coldframe.benchmarks.gpu.resident import Rested
from coldframe.benchmarks.harness import Row
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from coldframe.loader.timeline import Span
from tests.loader.devices.emulator import Emulator


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name.strip(): row for row in rows}


# -- captured steps -------------------------------------------------------------------------------


def answer(*times: float) -> Answer:
    made = Answer()
    made.times = list(times)
    return made


def test_a_rate_is_of_the_time_in_which_all_answers_are_made() -> None:
    first = answer(0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
    second = answer(1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
    # From 2 to 5, three tokens of each.
    assert together_rate([first, second]) == pytest.approx(2.0)
    with pytest.raises(LeftOut, match="2 answers were never made at one time"):
        together_rate([first, answer(6.0, 7.0, 8.0)])


def test_the_devices_memory_is_copied_and_given_back() -> None:
    emulator = Emulator()
    context = Context(Driver.open(emulator), 0)
    rates = bandwidth(context, 2 * context.granularity)
    assert len(rates) > 5
    assert min(rates) > 0
    assert emulator.calls["cuMemcpyDtoDAsync"] == len(rates) + 1
    context.close()
    assert emulator.left() == []
    emulator.close()


def test_captures_are_told_by_their_spans() -> None:
    spans = [
        Span("graph_capture", "decode-0", 0, 5_000_000, "1 x 8 blocks, in use; 1 so far"),
        Span("graph_capture", "decode-0", 0, 9_000_000, "2 x 8 blocks failed: out of memory"),
        Span("warmup", "decode-0", 0, 1, None),
        Span("graph_capture", "decode-0", 0, 7_000_000, "4 x 8 blocks, while idle; 2 so far"),
    ]
    done, failed = captures(spans)
    assert done == [0.005, 0.007]
    assert failed == ["2 x 8 blocks failed: out of memory"]


def test_an_archive_is_held_against_the_capture_of_as_many() -> None:
    said = "20 steps in 150.0 ms; 3 not: 8 x 16 blocks: there is no such kernel"
    steps, seconds = archived.restored(["none: they were not looked for", said])
    assert (steps, seconds) == (20, pytest.approx(0.15))
    found = archived.row(steps, seconds, 0.05)
    assert found.runs == [pytest.approx(0.15)]
    assert (found.target, found.at_least, found.met) == (0.2, False, True)
    for notes in ([], ["none: there is no archive"], ["0 steps in 1.0 ms; 4 not: no"]):
        with pytest.raises(LeftOut, match="no step was put together"):
            archived.restored(notes)


# -- at rest --------------------------------------------------------------------------------------


def test_what_a_wake_takes_beyond_the_weights() -> None:
    rested = Rested(16_000_000_000, [0.9, 0.8], [0.5, 0.6], [4.0, 0.2], 500_000_000)
    away = by_name(resident.rows("resident", rested, 40e9, away=True))
    beyond = away["resident: TTFT - the weights' way back"]
    assert beyond.runs == [pytest.approx(0.4), pytest.approx(0.2)]
    assert (beyond.target, beyond.at_least) == (0.3, False)
    ratio = away["resident: TTFT / (bytes / bare rate)"]
    assert ratio.runs == [pytest.approx(2.25), pytest.approx(2.0)]
    assert ratio.target is None
    assert away["resident: left on the GPU at rest"].runs == [500.0]
    up = by_name(resident.rows("up", rested, 40e9, away=False))
    assert up["up: TTFT - the weights' way back"].target is None
    assert up["up: TTFT / (bytes / bare rate)"].target == 1.10
    assert "up: bytes / bare rate" not in by_name(resident.rows("up", rested, None, away=False))


def test_a_wake_is_told_by_its_stages() -> None:
    spans = [
        Span("cuda_restore", "memory", 5, 10, None),
        Span("cuda_restore", "memory", 1_000_000_000, 1_200_000_000, None),
        Span("prefill[0]", "prefill-0", 2_000_000_000, 2_010_000_000, None),
        Span("prefill[1]", "prefill-0", 2_010_000_000, 2_030_000_000, None),
    ]
    assert resident.waking(spans, 500) == {
        "memory cuda_restore": "0.200 s",
        "prefill-0 prefill": "0.030 s",
    }


# -- images ---------------------------------------------------------------------------------------


def start(ttft: float, ready: float, **stages: float) -> dict[str, Any]:
    told = [{"name": "ready", "process": "prefill-0", "start_s": ready, "end_s": ready}]
    for name, seconds in stages.items():
        told.append({"name": name, "process": "prefill-0", "start_s": 0.1, "end_s": 0.1 + seconds})
        told.append({"name": name, "process": "decode-1", "start_s": 0.1, "end_s": 9.0})
    return {"ttft_s": ttft, "load_s": 1.0, "stages": told}


def test_a_start_from_an_image_beside_a_fresh_one() -> None:
    clones = [start(1.0, 0.5, snapshot_restore=0.2, cuda_restore=0.3), start(1.2, 0.6)]
    fresh = [start(4.0, 3.5), start(4.8, 3.6)]
    found = by_name(restored.rows("clone", clones, fresh))
    assert found["clone / fresh"].runs == [pytest.approx(0.25), pytest.approx(0.25)]
    assert found["clone: worker up, but for the weights"].runs == [0.5, 0.6]
    assert found["clone: cuda_restore"].runs == [pytest.approx(0.3), 0.0]
    assert found["clone: snapshot_restore"].runs == [pytest.approx(0.2), 0.0]
    assert "clone: hooks" not in found
    assert all(row.target is None for row in found.values())


# -- the rest -------------------------------------------------------------------------------------


def test_each_file_of_the_tests_for_a_gpu_is_in_one_part() -> None:
    returning, others = files_of(returning=True), files_of(returning=False)
    assert sorted(file.name for file in returning) == sorted(RETURNING)
    assert others
    assert not set(returning) & set(others)
