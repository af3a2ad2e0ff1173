from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.benchmarks.traffic.traces import (
    Arrival,
    compressed,
    cut,
    read_trace,
    scaled,
    split,
    token_scale,
)
from coldframe.loader.errors import RequestError

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
ARRIVALS = st.lists(
    st.builds(Arrival, st.floats(0, 1e4), st.integers(0, 8000), st.integers(0, 2000)),
    min_size=1,
    max_size=60,
)


def test_a_trace_is_read_in_the_order_of_its_arrivals(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        HEAD + "2023-11-16 18:17:04.0319600,3180,8\n2023-11-16 18:17:03.5319600,4808,10\n"
    )
    assert read_trace(trace) == [Arrival(0.0, 4808, 10), Arrival(0.5, 3180, 8)]


@pytest.mark.parametrize(
    "content",
    [
        "",
        HEAD,
        "a,b\n1,2\n",
        HEAD + "yesterday,1,2\n",
        HEAD + "2023-11-16 18:17:04,x,2\n",
        HEAD + "2023-11-16 18:17:04,-1,2\n",
        HEAD + "2023-11-16 18:17:04,1,-2\n",
        HEAD + "2023-11-16 18:17:04,1\n",
        "TIMESTAMP,ContextTokens\n2023-11-16 18:17:04,1\n",
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(content)
    with pytest.raises(RequestError, match="no trace"):
        read_trace(trace)
    with pytest.raises(RequestError, match="no trace"):
        read_trace(tmp_path / "none.csv")


@given(ARRIVALS, st.integers(1, 20), st.floats(0, 3))
def test_each_arrival_asks_one_model_and_always_the_same(
    arrivals: list[Arrival], models: int, skew: float
) -> None:
    asks = split(arrivals, models, skew)
    assert len(asks) == len(arrivals)
    assert all(0 <= model < models for model in asks)
    assert split(arrivals, models, skew) == asks
    # Of what came before, not of what comes after.
    assert split(arrivals[: len(arrivals) // 2], models, skew) == asks[: len(arrivals) // 2]


def test_shares_are_as_they_are_to_be() -> None:
    arrivals = [Arrival(float(number), number % 977, number % 31) for number in range(20_000)]
    even = split(arrivals, 4)
    assert [even.count(model) / 20_000 for model in range(4)] == pytest.approx([0.25] * 4, abs=0.02)
    skewed = split(arrivals, 3, 1.0)
    shares = [6 / 11, 3 / 11, 2 / 11]
    assert [skewed.count(model) / 20_000 for model in range(3)] == pytest.approx(shares, abs=0.02)
    # Known values: the split of a trace is the same on every machine.
    assert split(arrivals[:8], 5) == [1, 3, 4, 3, 0, 3, 0, 3]


def test_a_piece_begins_with_itself() -> None:
    arrivals = [Arrival(moment, 1, 1) for moment in (0.0, 5.0, 7.0, 12.0)]
    assert [a.at_s for a in cut(arrivals, 5.0, 7.0)] == [0.0, 2.0]
    assert [a.at_s for a in cut(arrivals, 6.0)] == [1.0, 6.0]
    for from_s, for_s in ((13.0, None), (-1.0, None), (0.0, 0.0), (8.0, 1.0), (0.0, -3.0)):
        with pytest.raises(RequestError):
            cut(arrivals, from_s, for_s)


def test_time_is_pressed_and_lengths_are_scaled_into_a_context() -> None:
    arrivals = [Arrival(0.0, 4000, 100), Arrival(60.0, 10, 1)]
    assert [a.at_s for a in compressed(arrivals, 4.0)] == [0.0, 15.0]
    for speed in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="no speed"):
            compressed(arrivals, speed)
    scale = token_scale(arrivals, 1024)
    assert scale == pytest.approx(1022 / 4100)
    assert scaled(arrivals, scale) == [Arrival(0.0, 997, 25), Arrival(60.0, 2, 1)]
    assert token_scale(arrivals, 100_000) == 1.0


@given(ARRIVALS, st.integers(4, 5000))
def test_whatever_is_scaled_fits(arrivals: list[Arrival], context: int) -> None:
    found = scaled(arrivals, token_scale(arrivals, context))
    assert all(a.context >= 1 and a.generated >= 1 for a in found)
    assert all(a.context + a.generated <= context for a in found)


@pytest.mark.parametrize(("models", "skew"), [(0, 0.0), (-1, 0.0), (2, -1.0), (2, float("nan"))])
def test_there_is_somebody_to_ask(models: int, skew: float) -> None:
    with pytest.raises(RequestError):
        split([Arrival(0.0, 1, 1)], models, skew)
