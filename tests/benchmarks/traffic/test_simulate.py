from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.benchmarks.traffic.played import HELD, Played
from coldframe.benchmarks.traffic.simulate import Setup, Sharing, simulate
from coldframe.benchmarks.traffic.stages import Draw, Line, Times
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.loader.errors import DeviceError, RequestError
from coldframe.runtime.scaling import FixedKeepAlive, Level, LivePolicy, Schedule

TIMES = Times(
    fresh=[4.0],
    restored=[1.0],
    parked=[0.5],
    end=[0.25],
    prefill=Line(0.0, 0.01),
    decode=Line(0.1, 0.0),
    how="made up",
)
"""A prompt of 100 tokens takes 1 s, and so do ten more tokens."""


def fixed(idle_s: float | None, park_s: float | None = 0.0) -> Callable[[], LivePolicy]:
    return lambda: FixedKeepAlive(idle_s, park_s)


def setup(policy: Callable[[], LivePolicy], **more: object) -> Setup:
    found = Setup(("a",), TIMES, policy, begin="zero")
    return replace(found, **more)  # type: ignore[arg-type]


def at(*moments: float) -> list[Arrival]:
    return [Arrival(moment, 100, 11) for moment in moments]


def stays(played: Played, name: str = "a") -> list[tuple[str, float, float]]:
    return [
        (s.state, pytest.approx(s.start_s), pytest.approx(s.end_s)) for s in played.states[name]
    ]


def test_a_model_comes_from_zero_and_goes_back() -> None:
    played = simulate(at(1.0, 20.0), [0, 0], setup(fixed(5.0)), 30.0)
    assert stays(played) == [
        ("zero", 0, 1),
        ("starting", 1, 6),  # 4 s, and the prompt's
        ("warm", 6, 12),  # a second of decode, and five in which nobody asks
        ("draining", 12, 12.25),
        ("zero", 12.25, 20),
        ("starting", 20, 25),
        ("warm", 25, 30),
    ]
    assert [(a.ttft_s, a.met) for a in played.asked] == [(pytest.approx(5), "zero")] * 2
    assert played.cold_starts == played.starts == 2
    assert played.gpu_s == pytest.approx(11.25 + 10)


def test_one_that_is_parked_is_sooner_there() -> None:
    played = simulate(at(0.0, 15.0), [0, 0], setup(fixed(5.0, 10.0)), 60.0)
    assert stays(played) == [
        ("starting", 0, 5),
        ("warm", 5, 11),
        ("parked", 11, 15),
        ("warm", 15, 22.5),  # awake after half a second
        ("parked", 22.5, 32.75),  # ended after ten, in a quarter of a second
        ("zero", 32.75, 60),
    ]
    assert [(a.ttft_s, a.met) for a in played.asked] == [
        (pytest.approx(5), "zero"),
        (pytest.approx(1.5), "parked"),
    ]
    assert played.parked_s == pytest.approx(14.25)


def test_who_comes_meanwhile_waits_for_the_start_and_for_the_prompts_before() -> None:
    played = simulate(at(0.0, 1.0, 5.5, 7.0), [0] * 4, setup(fixed(5.0)))
    assert [a.ttft_s for a in played.asked] == pytest.approx([5.0, 5.0, 1.5, 1.0])
    assert [a.met for a in played.asked] == ["zero", "zero", "warm", "warm"]


def test_who_comes_while_it_is_ended_has_it_started_again() -> None:
    played = simulate(at(0.0, 11.1), [0, 0], setup(fixed(5.0)))
    # It was to end at 11, and has by 11.25.
    assert played.asked[1].met == "zero"
    assert played.asked[1].ttft_s == pytest.approx(0.15 + 5.0)


def test_steps_of_decode_take_as_long_as_their_batch_has_them() -> None:
    times = replace(TIMES, decode=Line(0.0, 0.1), prefill=Line(0.0, 0.0))
    world = setup(fixed(None), times=times, begin="warm")
    arrivals = [Arrival(0.0, 1, 11), Arrival(0.5, 1, 11)]
    # Five tokens alone; then two answers at half the pace: the first ends after a second more, with
    # five of the second's made, and the other five take half a second.
    played = simulate(arrivals, [0, 0], world)
    assert played.seconds == pytest.approx(0.5 + 1.0 + 0.5)


def test_no_more_than_so_many_are_with_the_workers() -> None:
    world = setup(fixed(None), begin="warm", running=1)
    played = simulate(at(0.0, 0.0), [0, 0], world)
    assert [a.ttft_s for a in played.asked] == pytest.approx([1.0, 3.0])


def test_a_schedule_has_it_there_before_somebody_asks() -> None:
    class Again(FixedKeepAlive):
        def idle(self, at_s: float) -> Schedule:
            return Schedule(((0.0, "warm"), (2.0, "zero"), (20.0, "warm"), (30.0, "zero")))

    played = simulate(at(0.0, 30.0), [0, 0], setup(Again), 80.0)
    assert stays(played) == [
        ("starting", 0, 5),
        ("warm", 5, 8),
        ("draining", 8, 8.25),
        ("zero", 8.25, 26),  # twenty seconds after the answer's end
        ("starting", 26, 31),  # somebody comes at 30, when it is there
        ("warm", 31, 34),
        ("draining", 34, 34.25),
        ("zero", 34.25, 52),
        ("starting", 52, 56.01),  # a token for nobody
        ("warm", 56.01, 62),
        ("draining", 62, 62.25),
        ("zero", 62.25, 80),
    ]
    late = simulate(at(0.0, 32.0), [0, 0], setup(Again), 80.0)
    assert [a.met for a in late.asked] == ["zero", "warm"]
    assert late.asked[1].ttft_s == pytest.approx(1.0)
    # Whoever had nobody come is at zero again.
    assert [s.state for s in late.states["a"]][-1] == "zero"


class Scheduled(FixedKeepAlive):
    """Has a schedule, and says what it is told of starts."""

    def __init__(self, *steps: tuple[float, Level]) -> None:
        super().__init__(None, None)
        self._steps = steps
        self.told: list[tuple[Level, float]] = []

    def idle(self, at_s: float) -> Schedule:
        return Schedule(self._steps)

    def started(self, level: Level, seconds: float) -> None:
        self.told.append((level, pytest.approx(seconds)))


def each(*policies: LivePolicy) -> Callable[[], LivePolicy]:
    left = iter(policies)
    return lambda: next(left)


def test_what_would_go_as_soon_as_it_is_there_is_not_begun() -> None:
    short = Scheduled((0.0, "warm"), (2.0, "zero"), (20.0, "warm"), (24.5, "zero"))
    played = simulate(at(0.0), [0], setup(each(short)), 60.0)
    # Its start takes 5 s.
    assert [s.state for s in played.states["a"]] == ["starting", "warm", "draining", "zero"]


def test_who_is_parked_early_is_parked_for_as_long_as_was_said() -> None:
    world = setup(fixed(20.0, 10.0), names=("a", "b"), sharing=Sharing(10, 8, 0))
    played = simulate(at(0.0, 10.0), [0, 1], world, 60.0)
    # Nobody asks from 6 on; b has its room at 10.
    assert stays(played, "a") == [
        ("starting", 0, 5),
        ("warm", 5, 10),
        ("parked", 10, 20.25),
        ("zero", 20.25, 60),
    ]


def test_who_is_to_be_warm_again_is_so_once_there_is_room() -> None:
    again = Scheduled((0.0, "warm"), (2.0, "parked"), (20.0, "warm"), (50.0, "zero"))
    policies = each(again, FixedKeepAlive(10.0, 0.0))
    world = setup(policies, names=("a", "b"), sharing=Sharing(10, 8, 0))
    played = simulate(at(0.0, 15.0), [0, 1], world, 40.0)
    # At 26, when it is to be there, b has the room, until it rests at 31 and has ended.
    assert stays(played, "a") == [
        ("starting", 0, 5),
        ("warm", 5, 8),
        ("parked", 8, 31.25),
        ("warm", 31.25, 40),
    ]
    assert again.told == [("zero", 5.0), ("parked", 0.5)]


def test_who_comes_for_nobody_is_in_nobodys_way() -> None:
    again = Scheduled((0.0, "warm"), (2.0, "zero"), (20.0, "warm"), (50.0, "zero"))
    other = Scheduled((0.0, "warm"))
    policies = each(again, other)
    world = setup(policies, names=("a", "b"), sharing=Sharing(10, 8, 6))
    played = simulate(at(0.0, 27.0), [0, 1], world, 40.0)
    assert stays(played, "a")[3:] == [
        ("zero", 8.25, 26),
        ("starting", 26, 27.25),
        ("zero", 27.25, 40),
    ]
    assert played.asked[1].ttft_s == pytest.approx(5.25)
    # A start is as long as it takes from when there is room.
    assert other.told == [("zero", 5.0)]


def test_two_that_do_not_fit_together_take_turns() -> None:
    world = setup(fixed(None), names=("a", "b"), sharing=Sharing(10, 8, 6))
    played = simulate(at(0.0, 10.0), [0, 1], world, 20.0)
    assert stays(played, "a") == [
        ("starting", 0, 5),
        ("warm", 5, 10),
        ("draining", 10, 10.25),
        ("zero", 10.25, 20),
    ]
    assert stays(played, "b") == [("zero", 0, 10), ("starting", 10, 15.25), ("warm", 15.25, 20)]
    assert played.asked[1].ttft_s == pytest.approx(5.25)
    # One whose weights leave the device is parked for that, and soon back, if it may be parked.
    leaves = replace(world, sharing=Sharing(10, 8, 0))
    ended = simulate(at(0.0, 10.0), [0, 1], leaves, 20.0)
    assert [s.state for s in ended.states["a"]] == ["starting", "warm", "draining", "zero"]
    parks = replace(leaves, policy=fixed(None, None))
    away = simulate(at(0.0, 10.0, 20.0), [0, 1, 0], parks, 30.0)
    assert [s.state for s in away.states["a"]] == ["starting", "warm", "parked", "warm"]
    assert away.asked[2].ttft_s == pytest.approx(1.5)
    with pytest.raises(DeviceError, match="does not fit"):
        simulate(at(0.0), [0], replace(world, sharing=Sharing(7, 8, 6)))


def test_who_is_being_asked_stays_as_long_as_its_start_took() -> None:
    busy = [Arrival(0.0, 100, 1000), Arrival(6.0, 100, 11)]
    world = setup(fixed(None), names=("a", "b"), sharing=Sharing(10, 8, 6))
    played = simulate(busy, [0, 1], world)
    # a is warm at 5, and asked until 105: it may be sent away at 10, and goes with its answer.
    found = {s.state: s for s in played.states["a"]}
    assert found["draining"].start_s == pytest.approx(10.0)
    assert found["draining"].end_s == pytest.approx(5 + 99.9 + 0.25)
    assert played.asked[1].ttft_s == pytest.approx(105.15 - 6 + 5)


def test_a_pool_has_as_many_parked_as_it_is_to() -> None:
    world = setup(fixed(1.0, None), names=("a", "b", "c"), pool=1, begin="first")
    played = simulate(at(20.0, 40.0), [1, 2], world, 60.0)
    assert [s.state for s in played.states["a"]][-1] == "zero"
    assert [s.state for s in played.states["b"]][-1] == "zero"
    assert [s.state for s in played.states["c"]][-1] == "parked"
    ahead = simulate(at(50.0), [0], replace(world, pool=2, begin="first"), 60.0)
    assert [s.state for s in ahead.states["b"]] == ["zero", "starting", "parked"]


def test_runs_are_drawn_alike_often() -> None:
    draw = Draw([1.0, 2.0, 3.0], seed=4)
    drawn = [draw() for _ in range(9)]
    assert sorted(drawn) == [1.0] * 3 + [2.0] * 3 + [3.0] * 3
    again = Draw([1.0, 2.0, 3.0], seed=4)
    assert [again() for _ in range(9)] == drawn


def test_nothing_is_simulated_of_nothing() -> None:
    for arrivals, asks, world in (
        ([], [], setup(fixed(1.0))),
        (at(0.0), [1], setup(fixed(1.0))),
        (at(0.0), [], setup(fixed(1.0))),
        (at(0.0), [0], setup(fixed(1.0), names=())),
        (at(0.0), [0], setup(fixed(1.0), times=replace(TIMES, fresh=[]))),
    ):
        with pytest.raises(RequestError):
            simulate(arrivals, asks, world)


# -- whatever the trace is -------------------------------------------------------------------------

NAMES = ("a", "b", "c")
TRACES = st.lists(
    st.tuples(
        st.floats(0, 60), st.integers(1, 300), st.integers(1, 60), st.integers(0, len(NAMES) - 1)
    ),
    min_size=1,
    max_size=25,
)
POLICIES = st.sampled_from(
    [fixed(0.0), fixed(2.0), fixed(7.5), fixed(None), fixed(1.0, 5.0), fixed(3.0, None)]
)
WORLDS = st.fixed_dictionaries(
    {
        "begin": st.sampled_from(["zero", "first", "warm"]),
        "pool": st.sampled_from([0, 0, 1, 2]),
        "running": st.sampled_from([1, 2, 32]),
        "sharing": st.sampled_from([None, Sharing(10, 8, 6), Sharing(17, 8, 6), Sharing(10, 8, 0)]),
        "seed": st.integers(0, 3),
    }
)


def played_of(
    trace: list[tuple[float, int, int, int]], world: Setup, seconds: float | None = None
) -> Played:
    rows = sorted(trace)
    return simulate(
        [Arrival(moment, context, made) for moment, context, made, _ in rows],
        [model for *_, model in rows],
        world,
        seconds,
    )


@given(TRACES, POLICIES, WORLDS)
def test_each_is_answered_once_and_a_model_is_always_something(
    trace: list[tuple[float, int, int, int]],
    policy: Callable[[], LivePolicy],
    more: dict[str, object],
) -> None:
    world = setup(policy, names=NAMES, **more)
    played = played_of(trace, world, 200.0)
    assert sorted((a.at_s, a.model) for a in played.asked) == sorted(
        (moment, NAMES[model]) for moment, _, _, model in trace
    )
    least = {(m, NAMES[n]): TIMES.prefill(context) for m, context, _, n in sorted(trace)}
    assert all(a.ttft_s > 0 for a in played.asked)
    if len(least) == len(trace):
        assert all(a.ttft_s >= least[a.at_s, a.model] - 1e-6 for a in played.asked)
    assert played.seconds >= 200.0
    held = 0.0
    for name in NAMES:
        found = played.states[name]
        assert found[0].start_s == 0
        assert found[-1].end_s == pytest.approx(played.seconds)
        assert all(a.end_s == b.start_s and a.state != b.state for a, b in pairwise(found))
        assert all(stay.start_s < stay.end_s for stay in found)
        held += sum(stay.end_s - stay.start_s for stay in found if stay.state in HELD)
    assert played.gpu_s == pytest.approx(held)
    assert played.held_s <= played.gpu_s + 1e-6
    total = sum(played.seconds_in(state) for state in (*HELD, "zero", "parked"))
    assert total == pytest.approx(len(NAMES) * played.seconds)
    assert played_of(trace, world, 200.0) == played  # and the same again


@given(TRACES, POLICIES, st.integers(0, 3))
def test_always_on_has_no_cold_start_and_plain_zero_the_most(
    trace: list[tuple[float, int, int, int]], policy: Callable[[], LivePolicy], seed: int
) -> None:
    # With starts that take no time: else who starts later is warm until later, and who comes then
    # may meet it there.
    times = replace(TIMES, fresh=[0.0], parked=[0.0], end=[0.0])
    world = setup(policy, names=NAMES, times=times, seed=seed)
    on = played_of(trace, replace(world, policy=fixed(None), begin="warm"), 200.0)
    some = played_of(trace, world, 200.0)
    none = played_of(trace, replace(world, policy=fixed(0.0)), 200.0)
    assert on.cold_starts == 0
    assert on.gpu_s == pytest.approx(len(NAMES) * on.seconds)
    assert on.cold_starts <= some.cold_starts <= none.cold_starts
    assert on.gpu_s >= some.gpu_s - 1e-6
    assert some.gpu_s >= none.gpu_s - 1e-6
