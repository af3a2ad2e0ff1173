from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.timeline import Span
from coldframe.runtime.endpoint.frontstats import (
    BusyClock,
    FrontStats,
    critical_seconds,
    resident,
    stage_seconds,
)
from coldframe.runtime.timeline.timeline import Timeline

S = 1_000_000_000
EXEC = 5 * S


def span(process: str, name: str, start: float, end: float, waits_for: str | None = None) -> Span:
    """A span, in seconds from the exec on."""
    return Span(name, process, EXEC + int(start * S), EXEC + int(end * S), None, waits_for)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# -- the clock ------------------------------------------------------------------------------------


def test_each_second_goes_to_the_state_that_it_was_in() -> None:
    clock = Clock()
    busy = BusyClock(clock)
    clock.now += 1
    busy.enter("idle")
    clock.now += 2
    busy.enter("used")
    clock.now += 4
    assert (busy.zero_s, busy.idle_s, busy.used_s) == (1, 2, 4)
    clock.now += 8  # what goes on counts, too
    assert busy.used_s == 12
    busy.enter("used")
    clock.now += 16
    busy.enter("zero")
    clock.now += 32
    assert (busy.zero_s, busy.idle_s, busy.used_s) == (33, 2, 28)


def test_a_device_second_is_one_of_each_device() -> None:
    clock = Clock()
    busy = BusyClock(clock, devices=("cuda:0", "cuda:1", "cuda:2", "cuda:3"))
    clock.now += 1
    busy.enter("used")
    clock.now += 2
    busy.enter("idle")
    clock.now += 3
    busy.enter("zero")
    assert (busy.zero_s, busy.used_s, busy.idle_s) == (1, 8, 12)
    assert busy.state == "zero"


def test_each_device_has_seconds_of_its_own() -> None:
    clock = Clock()
    busy = BusyClock(clock, ("cuda:0",))
    assert busy.by_device == {"cuda:0": {"used": 0, "idle": 0}}
    busy.enter("idle", ("cuda:0",))
    clock.now += 2
    busy.enter("idle", ("cpu",))  # it had to do without the GPU
    clock.now += 4
    busy.enter("used")
    clock.now += 8
    busy.enter("zero")
    assert busy.by_device == {"cuda:0": {"used": 0, "idle": 2}, "cpu": {"used": 8, "idle": 4}}
    assert (busy.idle_s, busy.used_s, busy.zero_s) == (6, 8, 0)


def test_of_several_devices_each_counts() -> None:
    clock = Clock()
    busy = BusyClock(clock, ("cuda:0", "cuda:1"))
    clock.now += 1
    busy.enter("used")
    clock.now += 2
    busy.enter("parked")
    clock.now += 4
    used = {"used": 2, "idle": 0}
    assert busy.by_device == {"cuda:0": used, "cuda:1": used}
    # Device seconds, and such of the clock.
    assert (busy.used_s, busy.parked_s, busy.zero_s) == (4, 4, 1)


@given(
    st.lists(
        st.tuples(st.sampled_from(["zero", "parked", "idle", "used"]), st.integers(0, 1000)),
        max_size=30,
    )
)
def test_no_time_is_lost_or_counted_twice(steps: list[tuple[str, int]]) -> None:
    clock = Clock()
    busy = BusyClock(clock)
    for state, seconds in steps:
        busy.enter(state)  # type: ignore[arg-type]
        clock.now += seconds
        held_s = busy.used_s + busy.idle_s + busy.parked_s
        assert held_s + busy.zero_s == clock.now - 1000


# -- a start's stages -----------------------------------------------------------------------------


def test_a_stage_lasts_while_some_process_is_at_it() -> None:
    timeline = Timeline(
        [
            span("front", "imports", 0, 2),
            span("memory", "imports", 1, 3),
            span("memory", "imports", 1.5, 2.5),
            span("prefill-0", "imports", 5, 6),
            span("prefill-0", "prefill[embed]", 6, 7),
            span("prefill-0", "prefill[0]", 7, 9),
            span("prefill-0", "prefill[head]", 9, 10),
            span("prefill-0", "wait", 6, 6.5, waits_for="stage_ready[0]"),
            span("front", "decode", 9.5, 20),
            span("front", "last_token", 20, 20),
        ],
        EXEC,
        EXEC + 10 * S,
    )
    # Seven of the first eleven would be counted twice if processes were added up.
    assert stage_seconds(timeline) == {"imports": 4.0, "prefill": 4.0, "decode": 0.5}


def test_a_start_without_a_token_has_stages_and_no_critical_path() -> None:
    timeline = Timeline([span("memory", "plan", 1, 3)], EXEC, None)
    assert stage_seconds(timeline) == {"plan": 2.0}
    assert critical_seconds(timeline) == {}


def test_the_critical_stages_add_up_to_the_time_to_the_first_token() -> None:
    timeline = Timeline(
        [
            span("front", "interpreter", 0, 2),
            span("memory", "weight_read", 2, 8),
            span("prefill-0", "prefill[embed]", 8, 9),
            span("prefill-0", "prefill[head]", 9, 10),
        ],
        EXEC,
        EXEC + 11 * S,
    )
    found = critical_seconds(timeline)
    assert sum(found.values()) == pytest.approx(11)
    assert found["prefill"] == pytest.approx(2)
    assert found["unattributed"] == pytest.approx(1)


# -- what travels ---------------------------------------------------------------------------------


def test_the_numbers_travel_as_json() -> None:
    stats = FrontStats(
        kv_blocks_used=3,
        kv_blocks_total=8,
        weights_bytes=10**12,
        load_s=1.5,
        cold_starts={"image": 2},
        stages={"prefill": 0.25},
        critical={"imports": 0.1},
        device_s={"cuda:0": {"used": 1.5, "idle": 0.5}},
        device_faults={"lost": 1},
        workers={"vllm": {"starting": 1}},
        vllm_events={"failed_start": 1},
        memory={"memory": {"anon": 1, "shmem": 2}},
    )
    assert FrontStats.from_wire(json.loads(json.dumps(stats.to_wire()))) == stats
    assert FrontStats.from_wire({}) == FrontStats()


def test_a_process_own_memory_is_told_from_what_it_shares() -> None:
    hold = (
        "import mmap; shared = mmap.mmap(-1, 64 << 20); own = bytearray(b'x') * (32 << 20);"
        "[shared.__setitem__(i, 1) for i in range(0, 64 << 20, 4096)]; print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = resident(child.pid)
        child.communicate(b"\n")
    assert 64 << 20 <= found["shmem"] < 66 << 20
    assert 32 << 20 <= found["anon"] < 60 << 20
    assert found["file"] > 0
    assert resident(child.pid) == {}
    assert set(resident(os.getpid())) == {"anon", "file", "shmem"}
