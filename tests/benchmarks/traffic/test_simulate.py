from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.benchmarks.traffic.played import HELD, Played
from coldframe.benchmarks.traffic.simulate import Setup, Sharing, Takes, simulate
from coldframe.benchmarks.traffic.stages import Draw, Line, Times
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.loader.errors import DeviceError, RequestError
from coldframe.runtime.scaling.policies import FixedKeepAlive, Level, LivePolicy, Schedule

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


def shared(memory: int, warm: int, parked: int) -> Sharing:
    """A device of which all models take as much."""
    return Sharing(memory, [Takes(warm, parked)])


MIXED = Sharing(12, [Takes(8, 6), Takes(4, 0, 3), Takes(3, 0, 3)], 4)


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
    """Has a schedule, and says what it is told of starts.

    Args:
        steps: Its steps.
        scale_s: Within so long somebody asks with a half's chance, at any time.
    """

    def __init__(self, *steps: tuple[float, Level], scale_s: float | None = None) -> None:
        super().__init__(None, None)
        self._steps, self._scale_s = steps, scale_s
        self.told: list[tuple[Level, float]] = []

    def idle(self, at_s: float) -> Schedule:
        return Schedule(self._steps)

    def started(self, level: Level, seconds: float) -> None:
        self.told.append((level, pytest.approx(seconds)))

    def chance(self, idle_s: float, within_s: float) -> float:
        if self._scale_s is None:
            return super().chance(idle_s, within_s)
        return within_s / (within_s + self._scale_s)


def each(*policies: LivePolicy) -> Callable[[], LivePolicy]:
    left = iter(policies)
    return lambda: next(left)


def test_what_would_go_as_soon_as_it_is_there_is_not_begun() -> None:
    short = Scheduled((0.0, "warm"), (2.0, "zero"), (20.0, "warm"), (24.5, "zero"))
    played = simulate(at(0.0), [0], setup(each(short)), 60.0)
    # Its start takes 5 s.
    assert [s.state for s in played.states["a"]] == ["starting", "warm", "draining", "zero"]


def test_who_is_parked_early_is_parked_for_as_long_as_was_said() -> None:
    world = setup(fixed(20.0, 10.0), names=("a", "b"), sharing=shared(10, 8, 0))
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
    world = setup(policies, names=("a", "b"), sharing=shared(10, 8, 0))
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
    world = setup(policies, names=("a", "b"), sharing=shared(10, 8, 6))
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
    world = setup(fixed(None), names=("a", "b"), sharing=shared(10, 8, 6))
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
    leaves = replace(world, sharing=shared(10, 8, 0))
    ended = simulate(at(0.0, 10.0), [0, 1], leaves, 20.0)
    assert [s.state for s in ended.states["a"]] == ["starting", "warm", "draining", "zero"]
    parks = replace(leaves, policy=fixed(None, None))
    away = simulate(at(0.0, 10.0, 20.0), [0, 1, 0], parks, 30.0)
    assert [s.state for s in away.states["a"]] == ["starting", "warm", "parked", "warm"]
    assert away.asked[2].ttft_s == pytest.approx(1.5)
    with pytest.raises(DeviceError, match="does not fit"):
        simulate(at(0.0), [0], replace(world, sharing=shared(7, 8, 6)))


def test_who_is_being_asked_stays_as_long_as_its_start_took() -> None:
    busy = [Arrival(0.0, 100, 1000), Arrival(6.0, 100, 11)]
    world = setup(fixed(None), names=("a", "b"), sharing=shared(10, 8, 6))
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


# -- who may be held, where not all can be ---------------------------------------------------------


def test_a_budget_ends_what_is_held_for_nobody() -> None:
    played = simulate(at(0.0), [0], setup(fixed(None), budget=10.0), 60.0)
    # Idle from 6 on, and held while there is a second left for it: an hour's budget fills it with
    # 1 in 360 meanwhile.
    states = played.states["a"]
    assert [s.state for s in states] == ["starting", "warm", "draining", "zero"]
    assert states[1].end_s == pytest.approx(6 + 9.0 / (1 - 10 / 3600), abs=0.3)
    # What was used before is not there.
    used = setup(fixed(None), budget=10.0, budget_left=5.0)
    less = simulate(at(0.0), [0], used, 60.0)
    assert less.states["a"][1].end_s == pytest.approx(states[1].end_s - 5.0, abs=0.3)
    # Whoever asks again costs none of it, and then it is held for what is left: nearly nothing.
    again = simulate(at(0.0, 30.0), [0, 0], setup(fixed(None), budget=10.0), 60.0)
    assert again.cold_starts == 2
    last = [stay for stay in again.states["a"] if stay.state == "warm"][-1]
    assert last.end_s - last.start_s == pytest.approx(1.0, abs=0.6)  # its answer


def test_of_two_that_are_held_the_one_asked_longer_ago_goes_first() -> None:
    world = setup(fixed(None), names=("a", "b"), budget=20.0)
    played = simulate(at(0.0, 6.0), [0, 1], world, 60.0)
    warm = {name: [s for s in played.states[name] if s.state == "warm"] for name in "ab"}
    assert {name: len(stays) for name, stays in warm.items()} == {"a": 1, "b": 1}
    # a is idle from 6 on, b from 12 on; at 18 two seconds are left, which both need.
    assert warm["a"][0].end_s == pytest.approx(12 + (20 - 6 - 2) / 2, abs=0.5)
    assert warm["b"][0].end_s == pytest.approx(19.0, abs=0.6)


def test_who_is_parked_costs_none_of_the_budget() -> None:
    played = simulate(at(0.0), [0], setup(fixed(None, None), budget=10.0), 60.0)
    assert [s.state for s in played.states["a"]] == ["starting", "warm", "parked"]


def test_who_is_to_come_waits_for_one_that_is_worth_more() -> None:
    """Until nobody has asked that one for so long that it is worth less, and goes for it."""

    def policies() -> Callable[[], LivePolicy]:
        rises = Scheduled((0.0, "zero"), (20.0, "warm"), (1000.0, "zero"), scale_s=60.0)
        return each(rises, FixedKeepAlive())

    world = setup(policies(), names=("a", "b"), sharing=shared(10, 8, 6))
    played = simulate(at(0.0, 19.0), [0, 1], world, 600.0)
    # a is to come at 26; b is idle from 25 on.
    starts = [s.start_s for s in played.states["a"] if s.state == "starting"]
    b = played.states["b"]
    assert [s.state for s in b] == ["zero", "starting", "warm", "draining", "zero"]
    assert b[2].end_s > 30.0
    assert starts == [0.0, pytest.approx(b[3].end_s, abs=1.1)]
    # Where there is room for both nobody waits.
    wide = replace(world, policy=policies(), sharing=shared(16, 8, 6))
    both = simulate(at(0.0, 19.0), [0, 1], wide, 600.0)
    starts = [s.start_s for s in both.states["a"] if s.state == "starting"]
    assert starts == [0.0, pytest.approx(26.0, abs=0.3)]
    assert [s.state for s in both.states["b"]] == ["zero", "starting", "warm"]


def test_a_start_for_nobody_ends_where_the_budget_does() -> None:
    fresh = [4.0, 40.0]
    seed = next(number for number in range(100) if drawn(fresh, number))
    rises = Scheduled((0.0, "zero"), (20.0, "warm"), (1000.0, "zero"))
    world = setup(each(rises), times=replace(TIMES, fresh=fresh), seed=seed)
    # It is to be there 20 s after 6, and takes 40 s this time.
    free = simulate(at(0.0), [0], world, 200.0)
    states = ["starting", "warm", "draining", "zero", "starting"]
    assert [s.state for s in free.states["a"]] == [*states, "warm"]
    assert free.states["a"][4].end_s == pytest.approx(66.0, abs=0.1)
    short = simulate(at(0.0), [0], replace(world, policy=each(rises), budget=20.0), 200.0)
    assert [s.state for s in short.states["a"]] == [*states, "zero"]
    assert short.states["a"][4].end_s == pytest.approx(26 + 19 + 0.25, abs=0.5)
    # Somebody who asks meanwhile has it go on: now somebody waits for it.
    asked = replace(world, policy=each(rises), budget=20.0)
    late = simulate(at(0.0, 40.0), [0, 0], asked, 100.0)
    assert [s.state for s in late.states["a"]][:6] == [*states, "warm"]
    assert late.asked[1].met == "zero"


def drawn(runs: list[float], seed: int) -> bool:
    """Whether that seed has the runs drawn in their order."""
    draw = Draw(runs, seed)
    return [draw() for _ in runs] == runs


def test_weights_that_are_parked_take_the_hosts_memory() -> None:
    sharing = Sharing(10, [Takes(8, 0, 8)], 8)
    world = setup(fixed(2.0, None), names=("a", "b"), sharing=sharing, budget=1000.0)
    played = simulate(at(0.0, 20.0), [0, 1], world, 60.0)
    # There is room for one: for that which somebody has asked more lately.
    assert {name: played.states[name][-1].state for name in "ab"} == {"a": "zero", "b": "parked"}
    wide = replace(world, sharing=Sharing(10, [Takes(8, 0, 8)], 16))
    both = simulate(at(0.0, 20.0), [0, 1], wide, 60.0)
    assert {name: both.states[name][-1].state for name in "ab"} == {"a": "parked", "b": "parked"}


def test_models_of_several_sizes_have_the_room_that_they_need() -> None:
    sharing = Sharing(12, [Takes(8, 0), Takes(4, 0), Takes(3, 0)])
    world = setup(fixed(None), names=("a", "b", "c"), sharing=sharing)
    played = simulate(at(0.0, 10.0, 20.0), [0, 1, 2], world, 40.0)
    # a and b fit together; for c a has to go, which was asked longest ago.
    last = {name: played.states[name][-1].state for name in "abc"}
    assert last == {"a": "zero", "b": "warm", "c": "warm"}
    with pytest.raises(DeviceError, match="does not fit"):
        simulate(at(0.0), [0], replace(world, sharing=Sharing(7, [Takes(4, 0), Takes(8, 0)])))


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
        "sharing": st.sampled_from(
            [None, shared(10, 8, 6), shared(17, 8, 6), shared(10, 8, 0), MIXED]
        ),
        "budget": st.sampled_from([None, None, 2.0, 30.0]),
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
