"""What is counted beside a replica of real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.kv.options import KvStoreOptions
from coldframe.loader.timeline import now
from coldframe.runtime.endpoint.frontcount import FrontCount
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.timeline.timeline import Timeline
from tests.runtime.helpers import ask, prompt_of, wait_for


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.heavy
def test_a_replica_is_counted(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path
) -> None:
    clock = Clock()
    exec_ns = now()
    store = KvStoreOptions(str(tmp_path / "kv"))
    options = ReplicaOptions(model=str(demo_model("llama")), run_dir=str(no_leaks), kv_store=store)
    with Replica(options) as replica:
        count = FrontCount(clock)
        count.step(replica, idle=True)
        cold = count.stats(None, replica.pids)
        assert (cold.cold_starts, cold.stages, cold.kv_blocks_total) == ({}, {}, 0)
        clock.now += 3  # it loads, and nobody has asked yet
        client = ask(replica, prompt_of(40), 200)
        count.step(replica, idle=False)
        wait_for(replica, lambda: len(client.events) > 3 and replica.loaded)
        first_ns = now()
        clock.now += 5
        count.step(replica, idle=False)
        replica.ask_usage()  # it asks by itself once a second, which may be too late here
        wait_for(replica, lambda: replica.usage.get("kv_used", 0) > 0)
        timeline = Timeline([*replica.recorder.drain(), *replica.spans], exec_ns, first_ns)
        warm = count.stats(timeline, replica.pids)
        assert warm.cold_starts == {"fresh": 1}
        assert (warm.zero_s, warm.device_s) == (0, {"cpu": {"idle": 3, "used": 5}})
        assert 0 < warm.kv_blocks_used < warm.kv_blocks_total
        assert warm.weights_bytes == warm.bytes_loaded > 0
        assert warm.load_s > 0
        assert {"interpreter", "imports", "plan"} <= set(warm.stages)
        assert not any("[" in stage for stage in warm.stages)
        assert sum(warm.critical.values()) == pytest.approx((first_ns - exec_ns) / 1e9)
        assert set(warm.memory) == set(replica.pids)
        replica.cancel(client.request)
        count.step(replica, idle=True)
        clock.now += 7
        count.step(replica, idle=True)
        wait_for(replica, lambda: replica.usage["kv_used"] == 0 or bool(replica.ask_usage()))
        # What was computed is written behind it.
        wait_for(
            replica,
            lambda: bool(replica.usage["kv_store_disk_stored"] or replica.ask_usage()),
        )
        idle = count.stats(timeline, {})
        stored = idle.kv_store["disk_stored"]
        assert stored > 0
        assert idle.kv_store["disk_bytes"] > 0
        assert (idle.device_s, idle.kv_blocks_used) == ({"cpu": {"idle": 10, "used": 5}}, 0)
        assert idle.cold_starts == {"fresh": 1}
        assert (idle.stages, idle.memory) == (warm.stages, {})
        count.step(replica, idle=True, parked=True)
        clock.now += 11
        count.leave(replica)
        clock.now += 13
        count.step(None, idle=True)
        gone = count.stats(timeline, {})
        assert (gone.parked_s, gone.zero_s, gone.device_s["cpu"]["idle"]) == (11, 13, 10)
        assert (gone.bytes_loaded, gone.load_s) == (warm.bytes_loaded, warm.load_s)
        assert (gone.weights_bytes, gone.kv_blocks_total) == (0, 0)
        # What happened stays counted, and what was there is not there any more.
        assert gone.kv_store["disk_stored"] >= stored
        assert gone.kv_store["disk_bytes"] == 0
