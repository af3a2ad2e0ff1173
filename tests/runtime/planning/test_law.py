"""The law of the cold start, against a simulation of it and in its limits."""

from __future__ import annotations

import math
from dataclasses import replace

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


# -- where processors are few ----------------------------------------------------------------------

BUSY = Worker(0.1, 1.0, 0.01, 0.06, 0.03, 0.05, 0.01, busy=2.0, stream_s=4e-10)
"""Two processors are busy until it is up at 1 s; a GB takes 0.4 s of one on its way."""
HALF_A_GB = [100_000_000] * 5


@pytest.mark.parametrize(
    ("more", "processors", "up_s"),
    [
        ({}, 2, 1.1),  # 0.2 s of processor time, divided among two
        ({}, math.inf, 1.0),
        ({}, 4, 1.0),  # the other two have nothing else to do
        ({"busy": 1.0}, 2, 1.0),
        ({"busy": 1.9}, 2, 1.05),
        ({"streamed": 250_000_000.0}, 2, 1.05),  # half of it was in what was measured
        ({"streamed": 1e9}, 2, 1.0),
        ({"stream_s": 0.0}, 2, 1.0),
    ],
)
def test_what_a_stream_takes_is_missing_where_processors_are_few(
    more: dict[str, float], processors: float, up_s: float
) -> None:
    found = predict(replace(BUSY, **more), Path(1e9), HALF_A_GB, processors)
    assert found.parts["worker"] == pytest.approx(up_s)
    # All is in by then, and nothing computes beside it.
    assert found.ttft_s == pytest.approx(up_s + 0.01 + 0.06 + 2 * 0.03 + 0.05 + 0.01)
    assert found.parts["processors"] == pytest.approx(up_s - 1.0)
    # What is mapped where it lies takes none.
    there = predict(replace(BUSY, **more), Path(), HALF_A_GB, processors)
    assert there.parts["worker"] == 1.0


def test_who_comes_later_for_it_has_more_of_it_by_then() -> None:
    found = predict(BUSY, Path(1e8), HALF_A_GB, 2)
    # t = 1 + 4e-10 * 1e8 * (t - 0.1) / 2
    assert found.parts["worker"] == pytest.approx((1 - 0.002) / (1 - 0.02))
    # Of a way that takes more, more; and a stage beside it has two hundredths less of them.
    dear = predict(BUSY, Path(1e8, stream_s=4e-9), HALF_A_GB, 2)
    assert dear.parts["worker"] == pytest.approx((1 - 0.02) / (1 - 0.2))
    slower = found.parts["prefill"] / (0.01 + 0.06 + 2 * 0.03)
    assert 1.0 < slower < 1.5
    elsewhere = predict(BUSY, Path(1e8), HALF_A_GB, 2, computes_there=False)
    assert elsewhere.parts["prefill"] == pytest.approx(0.01 + 0.06 + 2 * 0.03 + 0.05)


@given(
    st.builds(
        Worker,
        *[SECONDS] * 7,
        busy=st.floats(0.0, 8.0),
        stream_s=st.floats(0.0, 0.01),
        streamed=st.floats(0.0, 500.0),
    ),
    st.lists(st.integers(1, 500), min_size=3, max_size=6),
    st.floats(1.0, 5000.0),
    st.integers(1, 8),
)
def test_fewer_processors_are_never_sooner_and_not_later_than_all_of_the_stream(
    worker: Worker, stages: list[int], rate: float, processors: int
) -> None:
    path = Path(rate)
    many, few, fewer = (
        predict(worker, path, stages, count) for count in (math.inf, processors + 1, processors)
    )
    assert many.ttft_s <= few.ttft_s + 1e-6 <= fewer.ttft_s + 2e-6
    took = worker.stream_s * sum(stages) / processors
    assert fewer.parts["worker"] <= worker.up_s + took + 1e-9
    # A stage has half of the processors at least.
    assert fewer.parts["prefill"] <= 2 * many.parts["prefill"] + 1e-9
    assert all(part >= -1e-9 for part in fewer.parts.values())


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


def test_a_token_for_nobody_is_not_the_clients() -> None:
    """Where the gateway is up last the worker has answered itself by then."""
    stages = [
        span("weight_read", "memory", 0.1, 0.2),
        span("stage_ready[0]", "memory", 0.2, 0.2),
        span("ready", "prefill-0", 0.25, 0.25),
    ]
    for start, layer in ((0.25, 0.2), (1.0, 0.1)):
        stages += [
            span("prefill[embedding]", "prefill-0", start, start + 0.01),
            span("prefill[0]", "prefill-0", start + 0.01, start + 0.01 + layer),
            span("prefill[head]", "prefill-0", start + 0.01 + layer, start + 0.02 + layer),
        ]
    found = worker_of(stages, 1.15)
    assert vars_of(found) == pytest.approx(vars_of(Worker(0.1, 1.0, 0.01, 0.1, 0.1, 0.01, 0.03)))


def vars_of(worker: Worker) -> list[float]:
    return [getattr(worker, name) for name in Worker.__slots__]
