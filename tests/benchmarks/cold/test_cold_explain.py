"""Stages, overlap and path, against a count of small pieces of time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.benchmarks.cold.explain import (
    asked_from,
    busy_times,
    load_s,
    mapped,
    path_of,
    rest_timeline,
)
from coldframe.loader.timeline import Span
from coldframe.runtime.timeline.timeline import Timeline

PROCESSES = ("front", "memory", "prefill-0")
NAMES = ("imports", "weight_read", "prefill[0]", "prefill[1]", "tokenizer", "stage_ready[0]")
ENDS = st.integers(0, 40)

spans = st.lists(
    st.builds(
        lambda name, process, a, b, waits: Span(
            name, process, min(a, b), max(a, b), None, "weights" if waits else None
        ),
        st.sampled_from(NAMES),
        st.sampled_from(PROCESSES),
        ENDS,
        ENDS,
        st.booleans(),
    ),
    max_size=12,
)


def timeline(found: list[Span], first: int | None = 40) -> dict[str, Any]:
    # The pieces are seconds; in the timeline they are nanoseconds.
    whole = [
        Span(s.name, s.process, s.start_ns * 10**9, s.end_ns * 10**9, s.note, s.waits_for)
        for s in found
    ]
    return Timeline(whole, 0, None if first is None else first * 10**9).to_json()


def busy_at(found: list[Span], key: tuple[str, str], at: int) -> bool:
    return any(
        (s.process, s.name.partition("[")[0]) == key
        and s.waits_for is None
        and not s.name.startswith("stage_ready")
        and s.start_ns <= at < s.end_ns
        for s in found
    )


@given(spans)
def test_busy_times_are_those_of_a_count(found: list[Span]) -> None:
    keys = {(s.process, s.name.partition("[")[0]) for s in found}
    busy = busy_times(timeline(found))
    for key in keys:
        mine = [at for at in range(40) if busy_at(found, key, at)]
        others = [at for at in mine if any(busy_at(found, k, at) for k in keys - {key})]
        load = [at for at in mine if any(busy_at(found, (p, "weight_read"), at) for p in PROCESSES)]
        if not mine:
            assert key not in busy
            continue
        assert busy[key].seconds == pytest.approx(len(mine))
        assert busy[key].overlap == pytest.approx(len(others))
        beside = 0 if key[1] == "weight_read" else len(load)
        assert busy[key].beside_weights == pytest.approx(beside)


@given(spans, st.integers(1, 40), st.floats(-0.9, 5))
def test_a_path_adds_up_to_what_the_client_saw(found: list[Span], first: int, later: float) -> None:
    path = path_of(timeline(found, first), first + later)
    assert sum(path.values()) == pytest.approx(first + later)
    assert min(path.values()) > 0


def test_who_waits_for_the_gateway_is_told_so() -> None:
    made = [
        Span("prefill[head]", "prefill-0", 6, 8),  # for nobody: the gateway is not there yet
        Span("imports", "gateway", 2, 15),
        Span("listen", "gateway", 17, 18),
        Span("queue", "prefill-0", 8, 20, None, "request"),
        Span("prefill[0]", "prefill-0", 20, 22),
        Span("prefill[head]", "prefill-0", 22, 25),
    ]
    path = path_of(timeline(made, 8), 26.5)
    assert path["gateway", "imports"] == pytest.approx(7)
    assert path["gateway", "listen"] == pytest.approx(1)
    assert path["prefill-0", "prefill"] == pytest.approx(2 + 5)
    assert path["", "unattributed"] == pytest.approx(6 + 2)
    assert path["client", "first_token"] == pytest.approx(2 + 1.5)


def test_a_front_that_notes_its_token_late_makes_no_path_longer_than_the_clients() -> None:
    made = [Span("imports", "front", 0, 6), Span("prefill[head]", "prefill-0", 6, 9)]
    path = path_of(timeline(made, 10), 8.5)
    assert path == pytest.approx({("front", "imports"): 6, ("prefill-0", "prefill"): 2.5})


def test_who_computed_before_the_gateway_listened_did_so_for_nobody() -> None:
    made = [
        Span("listen", "front", 1, 1),  # from then on the port takes whoever comes
        Span("prefill[head]", "prefill-0", 6, 8),
        Span("imports", "gateway", 2, 15),
    ]
    assert asked_from(timeline(made, 8), 1.5) == 15
    made.append(Span("listen", "gateway", 17, 18))
    assert asked_from(timeline(made, 8), 1.5) == 18
    assert asked_from(timeline(made, 8), 19.5) == 19.5
    assert asked_from(timeline(made[:2], 8), 0.0) == 0.0


def test_how_long_the_load_took_and_whether_it_was_one() -> None:
    read = Span("weight_read", "memory", 2, 9, "mapped in place; unverified")
    ready = [Span(f"stage_ready[{i}]", "memory", 5 + i, 5 + i) for i in range(3)]
    assert load_s(timeline([read, *ready])) == pytest.approx(5)
    assert mapped(timeline([read, *ready]))
    assert not mapped(timeline([Span("weight_read", "memory", 2, 9, "direct"), *ready]))
    assert not mapped(timeline([Span("weight_fetch", "memory", 2, 9, "http"), *ready]))
    assert load_s(timeline(ready)) is None
    assert load_s(timeline([read])) is None


def stage(name: str, process: str, start: float, end: float, **more: str) -> dict[str, Any]:
    return {"name": name, "process": process, "start_s": start, "end_s": end, **more}


def test_a_request_to_a_replica_that_is_there_has_a_path_of_its_own() -> None:
    bit = 1 / 1024  # of a second: sums of these are exact
    sent_s, ttft_s, queue_s = 128.0, 10 * bit, bit
    latest = [
        stage("prefill[head]", "prefill-0", sent_s - 2, sent_s - 1),  # of the one before
        stage("queue", "prefill-0", sent_s - 1, sent_s + 3 * bit, waits_for="request"),
        stage("tokenize", "prefill-0", sent_s + 3 * bit, sent_s + 4 * bit),
        stage("prefill[0]", "prefill-0", sent_s + 4 * bit, sent_s + 6 * bit),
        stage("h2d", "memory", sent_s + bit, sent_s + 5 * bit),
        stage("prefill[head]", "prefill-0", sent_s + 6 * bit, sent_s + 8 * bit),
        stage("decode", "decode-1", sent_s + 8 * bit, sent_s + 20 * bit),
    ]
    assert rest_timeline(latest[:3], sent_s, ttft_s, queue_s) is None  # it has not come yet
    told = rest_timeline(latest, sent_s, ttft_s, queue_s)
    assert told is not None
    assert told["ttft_s"] == ttft_s
    assert [s["name"] for s in told["stages"]] == [
        *("queue", "queue", "h2d", "tokenize", "prefill[0]", "prefill[head]", "decode")
    ]
    assert min(s["start_s"] for s in told["stages"]) == 0
    assert path_of(told, ttft_s) == {
        ("gateway", "queue"): bit,
        ("memory", "h2d"): 2 * bit,  # what came beside computing was not waited for
        ("prefill-0", "tokenize"): bit,
        ("prefill-0", "prefill"): 4 * bit,
        ("client", "first_token"): 2 * bit,
    }
    # What nobody tells of is said to be that.
    told = rest_timeline([s for s in latest if s["name"] != "h2d"], sent_s, ttft_s, queue_s)
    assert told is not None
    assert told["unattributed_s"] == 2 * bit
    assert sum(path_of(told, ttft_s).values()) == ttft_s


@given(spans, st.integers(0, 30), st.integers(1, 20), st.integers(0, 25))
def test_the_parts_of_a_rests_path_are_all_of_it(
    found: list[Span], sent: int, ttft: int, queue: int
) -> None:
    head = Span("prefill[head]", "prefill-0", sent, sent + 5)
    told = rest_timeline(timeline([*found, head])["stages"], sent, ttft, queue)
    assert told is not None
    assert sum(path_of(told, ttft).values()) == pytest.approx(ttft)
    assert all(step["start_s"] < step["end_s"] for step in told["critical_path"])
    assert all(0 <= s["start_s"] <= s["end_s"] for s in told["stages"])
