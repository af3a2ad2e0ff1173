from __future__ import annotations

import argparse
import random
from dataclasses import replace

import numpy as np
import pytest

from coldframe.benchmarks.traffic.arrivals import Lengths, Traffic, arrival_times
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.loader.errors import RequestError

TRAFFIC = Traffic(20.0, Lengths(8, 32), Lengths(4, 4), 64, 500)


@pytest.mark.parametrize("burstiness", [1.0, 0.25, 4.0])
def test_gaps_have_the_mean_and_the_variance_of_their_distribution(burstiness: float) -> None:
    rate, count = 5.0, 40_000
    found = arrival_times(rate, burstiness, count / rate, random.Random(1))
    gaps = np.diff([0.0, *found])
    # Bounds are five standard errors: of the mean, and of the variance by the fourth moment.
    variance = 1 / (rate**2 * burstiness)
    mean_error = (variance / count) ** 0.5
    assert gaps.mean() == pytest.approx(1 / rate, abs=5 * mean_error)
    kurtosis = 3 + 6 / burstiness
    error = variance * ((kurtosis - 1) / count) ** 0.5
    assert gaps.var() == pytest.approx(variance, abs=5 * error)
    assert len(found) == pytest.approx(count, abs=5 * (count / burstiness) ** 0.5)
    assert max(found) < count / rate


def test_a_poisson_process_has_as_many_arrivals_a_second_as_its_rate_with_that_variance() -> None:
    seconds, rate = 20_000, 3.0
    found = arrival_times(rate, 1.0, seconds, random.Random(2))
    counts = np.bincount(np.floor(found).astype(int), minlength=seconds)
    assert counts.mean() == pytest.approx(rate, abs=5 * (rate / seconds) ** 0.5)
    assert counts.var() == pytest.approx(rate, rel=0.1)


def test_there_is_always_a_request() -> None:
    assert len(arrival_times(1e-3, 1.0, 1.0, random.Random(0))) == 1


def test_a_seed_makes_one_load_and_prompts_begin_alike_nowhere() -> None:
    one, again, other = (TRAFFIC.load(10.0, seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert [ask.due_s for ask in one] == sorted(ask.due_s for ask in one)
    assert {len(ask.prompt) for ask in one} <= set(range(8, 33))
    assert len({len(ask.prompt) for ask in one}) > 10
    assert all(ask.tokens == 4 for ask in one)
    assert all(5 <= token < 500 for ask in one for token in ask.prompt)
    prompts = [ask.prompt[:8] for ask in one + other]
    assert len(set(prompts)) == len(prompts)


def test_a_trace_is_followed_scaled_into_the_context() -> None:
    trace = [Arrival(0.0, 6000, 400), Arrival(1.5, 300, 20), Arrival(30.0, 9999, 1)]
    traffic = replace(TRAFFIC, trace=trace)
    assert traffic.scale == 62 / 6400
    asks = traffic.load(None, 0)
    assert [(ask.due_s, len(ask.prompt), ask.tokens) for ask in asks] == [(0, 58, 4), (1.5, 3, 1)]
    assert traffic.longest == 62
    # Two requests in 20 seconds, pressed into as much time as makes four a second of them.
    assert [ask.due_s for ask in traffic.load(4.0, 0)] == [0, pytest.approx(1.5 / 40)]
    small = replace(traffic, context=1 << 20)
    assert small.scale == 1
    assert [len(ask.prompt) for ask in small.load(None, 0)] == [6000, 300]


def test_what_does_not_fit_the_context_is_refused() -> None:
    with pytest.raises(RequestError, match="context"):
        replace(TRAFFIC, context=35)
    replace(TRAFFIC, context=36)


def test_arrivals_need_a_rate_or_a_trace() -> None:
    with pytest.raises(RequestError, match="--rate"):
        TRAFFIC.load(None, 0)


def test_lengths_are_a_number_or_two() -> None:
    assert Lengths.parse("256") == Lengths(256, 256)
    assert Lengths.parse(" 64-512") == Lengths(64, 512)
    for wrong in ("", "0", "9-3", "a", "1-", "-1", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            Lengths.parse(wrong)
