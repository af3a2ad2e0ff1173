"""The law of the cold start, against a simulation of it and in its limits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.loader.errors import PlatformError
from coldframe.runtime.planning.law import Path, Worker, predict
from coldframe.runtime.planning.rehearsal import worker_of

SECONDS = st.floats(0.0, 3.0)
WORKERS = st.builds(Worker, *[SECONDS] * 7)


def simulated(worker: Worker, path: Path, stages: list[int], step_s: float = 1e-3) -> float:
    """Moment by moment: bytes come, and whoever is up computes what is in."""
    computes = [worker.embedding_s, worker.first_layer_s]
    computes += [worker.layer_s] * (len(stages) - 3) + [worker.head_s]
    now, got, stage, left = 0.0, 0.0, 0, computes[0]
    while stage < len(stages):
        now += step_s
        if now > worker.first_byte_s + path.latency_s:
            got += path.rate * step_s
        if now > worker.up_s and got >= sum(stages[: stage + 1]):
            left -= step_s
            while left <= 1e-12:
                stage += 1
                if stage == len(stages) or got < sum(stages[: stage + 1]):
                    left = computes[stage] if stage < len(stages) else 1.0
                    break
                left += computes[stage]
    return now + worker.out_s


@given(WORKERS, st.lists(st.integers(1, 500), min_size=3, max_size=6), st.floats(50.0, 5000.0))
def test_it_is_what_a_simulation_finds(worker: Worker, stages: list[int], rate: float) -> None:
    path = Path(rate, 0.05)
    found = predict(worker, path, stages)
    assert found.ttft_s == pytest.approx(simulated(worker, path, stages), abs=0.03)


@given(WORKERS, st.lists(st.integers(1, 500), min_size=3, max_size=6))
def test_without_bytes_to_wait_for_it_is_the_worker_and_its_prefill(
    worker: Worker, stages: list[int]
) -> None:
    found = predict(worker, Path(math.inf), stages)
    parts = found.parts
    begins = max(worker.up_s, worker.first_byte_s)
    assert found.ttft_s == pytest.approx(begins + parts["prefill"] + worker.out_s)
    assert parts["weights"] == 0


@given(WORKERS, st.lists(st.integers(1, 500), min_size=3, max_size=6))
def test_at_a_crawl_it_is_the_bytes_and_the_last_stage(worker: Worker, stages: list[int]) -> None:
    path = Path(1e-3)
    found = predict(worker, path, stages)
    bytes_s = worker.first_byte_s + sum(stages) / path.rate
    assert found.ttft_s == pytest.approx(bytes_s + worker.head_s + worker.out_s)
    # What is waited for is what nothing else hides.
    hidden = found.parts["prefill"] - worker.head_s
    assert found.parts["waits_for_weights"] == pytest.approx(bytes_s - worker.up_s - hidden)


def span(name: str, process: str, start: float, end: float) -> dict[str, object]:
    return {"name": name, "process": process, "start_s": start, "end_s": end}


def test_a_timeline_gives_the_workers_times() -> None:
    stages = [
        span("weight_read", "memory", 0.1, 0.5),
        span("stage_ready[0]", "memory", 0.2, 0.2),
        span("ready", "decode-1", 2.0, 2.0),
        span("ready", "prefill-0", 1.0, 1.0),
        span("prefill[embedding]", "prefill-0", 1.01, 1.02),
        span("prefill[0]", "prefill-0", 1.02, 1.08),
        span("prefill[1]", "prefill-0", 1.08, 1.1),
        span("prefill[2]", "prefill-0", 1.1, 1.14),
        span("prefill[head]", "prefill-0", 1.2, 1.25),
    ]
    found = worker_of(stages, 1.26)
    expected = Worker(0.1, 1.01, 0.01, 0.06, 0.03, 0.05, 0.01)
    assert vars_of(found) == pytest.approx(vars_of(expected))
    with pytest.raises(PlatformError, match="no such stage"):
        worker_of(stages[:3], 1.26)


def vars_of(worker: Worker) -> list[float]:
    return [getattr(worker, name) for name in Worker.__slots__]
