"""Schedules and the policies on requests that come in patterns."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.runtime.scaling.histogram import HybridHistogram
from coldframe.runtime.scaling.idle import Forecast, IdleHistogram
from coldframe.runtime.scaling.next import Costs, NextArrival
from coldframe.runtime.scaling.policies import LEVELS, FixedKeepAlive, LivePolicy, Schedule

ANSWER_S = 1.0


def play(policy: LivePolicy, gaps: Iterable[float], at_s: float = 1000.0) -> Schedule:
    """Requests with such idle times before each of them; the schedule behind the last."""
    policy.arrived(at_s)
    schedule = policy.idle(at_s + ANSWER_S)
    for gap in gaps:
        at_s += ANSWER_S + gap
        policy.arrived(at_s)
        schedule = policy.idle(at_s + ANSWER_S)
    return schedule


def outcome(policy: LivePolicy, gaps: list[float], learn: int) -> tuple[float, float]:
    """Which part of the requests was not warm, and warm seconds for each; after so many."""
    at_s, cold, held_s = 0.0, 0, 0.0
    for i, gap in enumerate(gaps):
        policy.arrived(at_s)
        schedule = policy.idle(at_s)
        at_s += gap
        if i >= learn:
            cold += schedule.level(gap) != "warm"
            ends = [start for start, _ in schedule.steps[1:]] + [math.inf]
            held_s += sum(
                max(0.0, min(gap, end) - start)
                for (start, level), end in zip(schedule.steps, ends, strict=True)
                if level == "warm"
            )
    return cold / (len(gaps) - learn), held_s / (len(gaps) - learn)


def every(seconds: float, count: int, jitter: float = 0.0) -> list[float]:
    dice = random.Random(1)
    return [seconds + dice.uniform(-jitter, jitter) for _ in range(count)]


def at_random(mean_s: float, count: int) -> list[float]:
    dice = random.Random(2)
    return [dice.expovariate(1 / mean_s) for _ in range(count)]


# -- schedules ------------------------------------------------------------------------------------


def test_a_schedule_says_what_is_when() -> None:
    schedule = Schedule(((0.0, "warm"), (60.0, "parked"), (300.0, "zero"), (3500.0, "warm")))
    told = [schedule.level(idle_s) for idle_s in (0, 59.9, 60, 299, 300, 3499, 3500, 1e9)]
    assert told == ["warm", "warm", "parked", "parked", "zero", "zero", "warm", "warm"]
    assert [schedule.next_s(idle_s) for idle_s in (0, 60, 3500)] == [60.0, 300.0, None]
    assert [schedule.rises(idle_s) for idle_s in (0, 60, 300, 3500)] == [False, False, False, True]
    assert [schedule.will_rise(idle_s) for idle_s in (0, 3499, 3500)] == [True, True, False]


def sound(schedule: Schedule) -> None:
    """What any schedule has to be."""
    times = [at_s for at_s, _ in schedule.steps]
    assert times[0] == 0.0
    assert times == sorted(set(times))
    assert all(level in LEVELS for _, level in schedule.steps)
    assert all(one[1] != two[1] for one, two in pairwise(schedule.steps))


GAPS = st.lists(st.floats(0, 1e7, allow_nan=False), max_size=40)


@given(GAPS, st.sampled_from(["fixed", "histogram", "next", "parking"]))
def test_every_schedule_is_sound(gaps: list[float], kind: str) -> None:
    policies: dict[str, LivePolicy] = {
        "fixed": FixedKeepAlive(10.0, 20.0),
        "histogram": HybridHistogram(samples=3, rest="parked"),
        "next": NextArrival(Costs(parked=1.0)),
        "parking": NextArrival(Costs(penalty=200)),
    }
    policy = policies[kind]
    at_s = 0.0
    for gap in gaps:
        policy.arrived(at_s)
        sound(policy.idle(at_s + 1))
        assert 0 <= policy.chance(gap, 60.0) <= 1
        at_s += 1 + gap
    sound(policy.idle(at_s))
    assert policy.why


@pytest.mark.parametrize(
    ("idle_s", "park_s", "steps"),
    [
        (None, 0.0, ((0.0, "warm"),)),
        (None, None, ((0.0, "warm"),)),
        (5.0, 0.0, ((0.0, "warm"), (5.0, "zero"))),
        (5.0, None, ((0.0, "warm"), (5.0, "parked"))),
        (5.0, 7.0, ((0.0, "warm"), (5.0, "parked"), (12.0, "zero"))),
        (0.0, 7.0, ((0.0, "parked"), (7.0, "zero"))),
        (0.0, 0.0, ((0.0, "zero"),)),
    ],
)
def test_the_fixed_one_is_the_same_for_everybody(
    idle_s: float | None, park_s: float | None, steps: object
) -> None:
    assert FixedKeepAlive(idle_s, park_s).idle(3.0).steps == steps


# -- the histogram --------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 3599, allow_nan=False), min_size=1, max_size=200),
    st.sampled_from([1.0, 5.0, 50.0, 95.0, 99.0, 100.0]),
)
def test_its_percentiles_are_numpys_up_to_a_bin(idle: list[float], percent: float) -> None:
    histogram = IdleHistogram(10.0, 3600.0)
    for idle_s in idle:
        histogram.add(idle_s)
    exact = float(np.percentile(idle, percent, method="inverted_cdf"))
    assert histogram.percentile(percent, up=False) == math.floor(exact / 10) * 10
    assert histogram.percentile(percent, up=True) == math.floor(exact / 10) * 10 + 10
    counts, _ = np.histogram(idle, bins=360, range=(0, 3600))
    assert histogram.variation == pytest.approx(counts.std() / counts.mean())


def test_what_comes_by_a_timer_is_warmed_ahead() -> None:
    schedule = play(HybridHistogram(start_s=7.0), every(600, 40, jitter=4))
    # 5 % end by 590 s and all by 610 s: each 10 % further, and the start before the first.
    assert schedule.steps == ((0.0, "zero"), (590 * 0.9 - 7, "warm"), (610 * 1.1, "zero"))
    cold, held_s = outcome(HybridHistogram(), every(600, 80, jitter=4), 20)
    assert cold == 0
    assert held_s < 90


def test_what_comes_all_the_time_stays_warm() -> None:
    policy = HybridHistogram()
    schedule = play(policy, at_random(8, 200))
    assert [level for _, level in schedule.steps] == ["warm", "zero"]
    assert "99 %" in policy.why


def test_a_break_no_longer_than_a_start_is_none() -> None:
    schedule = play(HybridHistogram(start_s=60.0), every(125, 40))
    assert schedule.steps == ((0.0, "warm"), (pytest.approx(143), "zero"))


def test_it_may_rest_parked() -> None:
    policy = HybridHistogram(rest="parked", start_s=1.0)
    assert policy.parks
    assert play(policy, every(600, 20)).level(1.0) == "parked"


def test_few_idle_times_or_such_as_say_nothing_get_the_standard() -> None:
    standard = ((0.0, "warm"), (77.0, "zero"))
    policy = HybridHistogram(keep_s=77.0, samples=8)
    assert play(policy, every(600, 7)).steps == standard
    assert "7 idle times" in policy.why
    assert play(HybridHistogram(keep_s=77.0, samples=8), every(600, 8)).steps != standard
    # As often of each length.
    policy = HybridHistogram(keep_s=77.0, bin_s=10, range_s=1000)
    assert play(policy, [float(i) for i in range(1000)]).steps == standard
    assert "CV" in policy.why


def test_whom_nobody_has_asked_since_it_was_started_gets_the_standard() -> None:
    for policy in (HybridHistogram(keep_s=77.0), NextArrival(keep_s=77.0)):
        assert policy.idle(5.0).steps == ((0.0, "warm"), (77.0, "zero"))
        play(policy, every(600, 20))
        assert policy.idle(2e5).steps == ((0.0, "warm"), (77.0, "zero"))


def test_traffic_of_long_ago_does_not_rule() -> None:
    day_s = 86400.0
    policy = HybridHistogram(start_s=1.0, half_s=day_s)
    play(policy, every(600, 1440))  # for ten days
    end_s = 1000 + 1440 * 601.0
    # Half a day is not enough to be sure.
    assert play(policy, every(60, 708), end_s).level(300) == "warm"
    end_s += 708 * 61
    assert play(policy, every(60, 6 * 1416), end_s).level(300) == "zero"
    end_s += 6 * 1416 * 61
    # What was saved fades on while nothing runs.
    state = json.loads(json.dumps(policy.saved(end_s)))
    after = HybridHistogram(half_s=day_s)
    after.restore(state, 5.0, day_s)
    after.arrived(5.0)
    assert after.histogram.total == pytest.approx(policy.histogram.total / 2, rel=0.04)
    # However short each process lives.
    before = after.histogram.total
    for _ in range(48):
        state = after.saved(1805.0)
        after = HybridHistogram(half_s=day_s)
        after.restore(state, 5.0, 0.0)
        after.arrived(5.0)
    assert after.histogram.total == pytest.approx(before / 2, rel=0.01)


def test_idle_times_beyond_its_range_are_forecast() -> None:
    policy = HybridHistogram(range_s=3600.0, start_s=10.0)
    schedule = play(policy, every(20000, 20, jitter=200))
    assert "forecast" in policy.why
    assert [level for _, level in schedule.steps] == ["zero", "warm", "zero"]
    assert schedule.level(20000) == "warm"
    assert schedule.steps[1][0] > 15000
    # What is as good as any guess is none.
    wild = HybridHistogram(range_s=3600.0, keep_s=77.0)
    dice = random.Random(3)
    gaps = [10 ** dice.uniform(3.7, 6) for _ in range(40)]
    assert play(wild, gaps).steps == ((0.0, "warm"), (77.0, "zero"))


def test_a_forecast_follows_and_knows_how_far_off_it_was() -> None:
    forecast = Forecast()
    for idle_s in [100.0] * 10:
        forecast.add(idle_s)
    assert forecast.window == pytest.approx((100 / 1.15, 115))
    for idle_s in [1000.0] * 2:
        forecast.add(idle_s)
    assert forecast.window is None
    for idle_s in [1000.0] * 30:
        forecast.add(idle_s)
    window = forecast.window
    assert window is not None
    assert window[0] < 1000 < window[1]


# -- the next arrival -----------------------------------------------------------------------------


def test_who_asks_all_the_time_finds_it_warm_and_who_seldom_does_is_not_waited_for() -> None:
    often, seldom = at_random(5, 300), at_random(5000, 300)
    costs = Costs(penalty=30, parked=1.0, zero_s=10)
    cold, held_s = outcome(NextArrival(costs), often, 100)
    assert cold < 0.02
    assert held_s < 6
    cold, held_s = outcome(NextArrival(costs), seldom, 100)
    assert cold > 0.98
    assert held_s < 15


def test_it_costs_less_than_any_fixed_time_where_a_timer_asks() -> None:
    gaps = every(300, 120, jitter=5)
    cold, held_s = outcome(NextArrival(Costs(penalty=30, parked=1.0, zero_s=10)), gaps, 40)

    def cost(cold: float, held_s: float) -> float:
        return held_s + cold * 10 * 30

    fixed = [cost(*outcome(FixedKeepAlive(idle_s), gaps, 40)) for idle_s in (0, 60, 150, 290, 400)]
    assert cold == 0
    assert cost(cold, held_s) < 0.5 * min(fixed)


def test_between_bursts_it_is_at_zero() -> None:
    dice = random.Random(4)
    gaps = [dice.expovariate(1 / 3) if i % 20 else dice.uniform(3000, 5000) for i in range(800)]
    cold, held_s = outcome(NextArrival(Costs(penalty=30, parked=1.0)), gaps, 200)
    assert cold < 0.1
    assert held_s < 10


def test_what_is_on_by_day_and_off_by_night_is_learned() -> None:
    """Ten requests an hour by day: the night's first hours are not waited through."""
    dice = random.Random(5)
    policy = NextArrival(Costs(penalty=300, parked=1.0, zero_s=10))
    at_s, last_day = 0.0, {"day": 0, "night": 0}
    while at_s < 12 * 86400:
        hour = at_s % 86400 / 3600
        gap = dice.expovariate(10 / 3600)
        if hour + gap / 3600 > 12:  # the next morning
            gap = (24 - hour) * 3600 + dice.expovariate(10 / 3600)
        policy.arrived(at_s)
        schedule = policy.idle(at_s + 1)
        if at_s > 10 * 86400:
            last_day["night" if gap > 40000 else "day"] += 1
            if gap > 40000:
                # Not through the night.
                held_s = sum(
                    end - start
                    for (start, level), (end, _) in pairwise(schedule.steps)
                    if level == "warm" and end < 40000
                )
                assert held_s < 4 * 3600
        at_s += gap
    assert last_day["night"] >= 1
    assert last_day["day"] > 100
    assert policy.arrivals.weights["of_day"] > 1 / 6


def test_what_a_start_takes_decides() -> None:
    gaps = at_random(100, 100)
    slow, quick = (NextArrival(Costs(penalty=30, parked=1.0, zero_s=s)) for s in (60.0, 0.5))
    assert play(slow, gaps).level(10) == "warm"
    assert play(quick, gaps).level(10) == "zero"
    for _ in range(20):
        quick.started("zero", 60.0)
    assert play(quick, []).level(10) == "warm"


@pytest.mark.parametrize("policy", [HybridHistogram(), NextArrival()])
def test_what_waited_for_something_else_is_no_start(policy: HybridHistogram | NextArrival) -> None:
    def taken() -> float:
        found = policy.saved(0.0)["start_s"]
        return float(found[0] if isinstance(found, list) else found)

    for _ in range(20):
        policy.started("zero", 8.0)
    assert taken() == pytest.approx(8.0, abs=0.01)
    policy.started("zero", 1e9)
    assert taken() < 2000
    policy.started("zero", math.nan)
    policy.started("zero", -1.0)
    assert taken() < 2000
    for _ in range(20):
        policy.started("zero", 8.0)
    assert taken() == pytest.approx(8.0, abs=0.01)


def test_parked_is_chosen_where_it_is_cheap() -> None:
    gaps = at_random(300, 100)
    assert play(NextArrival(Costs(penalty=30, parked=0.01)), gaps).level(100) == "parked"
    without = NextArrival(Costs(penalty=30, parked=1.0))
    assert not without.parks
    assert "parked" not in [level for _, level in play(without, gaps).steps]


@settings(max_examples=30)
@given(GAPS, st.floats(0.5, 1000), st.floats(0, 1))
def test_dearer_waiting_never_makes_it_colder_at_once(
    gaps: list[float], penalty: float, parked: float
) -> None:
    levels = []
    for times in (1, 4):
        policy = NextArrival(Costs(penalty=penalty * times, parked=parked), samples=1)
        levels.append(LEVELS.index(play(policy, gaps).level(0)))
    assert levels[0] <= levels[1]


# -- what outlives a process ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["histogram", "next"])
def test_what_it_has_learned_goes_on_in_another_process(kind: str) -> None:
    def make() -> LivePolicy:
        return HybridHistogram() if kind == "histogram" else NextArrival()

    gaps = every(600, 30, jitter=5)
    before, at_s = make(), 1000.0
    play(before, gaps)
    now_s = at_s + sum(gaps) + 31 * ANSWER_S
    state = json.loads(json.dumps(before.saved(now_s + 20)))
    after = make()
    # Another clock, and 200 s in which there was no process.
    after.restore(state, 50.0, 200.0)
    before.arrived(now_s + 600)
    after.arrived(50.0 + 600 - 220)
    want, got = before.idle(now_s + 601), after.idle(50.0 + 601 - 220)
    for idle_s in (100, 400, 590, 605, 1000):
        assert got.level(idle_s) == want.level(idle_s)
        # Parts of an hour are turned by whole parts.
        chances = [policy.chance(idle_s, 50) for policy in (before, after)]
        assert chances[1] == pytest.approx(chances[0], abs=0.05)


@pytest.mark.parametrize("kind", ["fixed", "histogram", "next"])
@pytest.mark.parametrize(
    "damage",
    [
        {"policy": "another"},
        {"policy": None, "counts": {"-1": 3}},
        {"policy": None, "arrivals": {"seen": 1, "weights": {}, "guesses": {}}},
        {},
    ],
)
def test_a_state_that_is_none_changes_nothing(kind: str, damage: dict[str, object]) -> None:
    policies: dict[str, LivePolicy] = {
        "fixed": FixedKeepAlive(5.0),
        "histogram": HybridHistogram(),
        "next": NextArrival(),
    }
    policy = policies[kind]
    play(policy, every(600, 20))
    before = policy.saved(2e4)
    state = {**before, **damage} if damage else {}
    if state.get("policy", "") is None:
        state["policy"] = kind
        if all(name not in before for name in damage if name != "policy"):
            return  # it has no such thing
    with pytest.raises((ValueError, TypeError, KeyError)):
        policy.restore(state, 3.0, 0.0)
    assert policy.saved(2e4) == before
