"""The policy, second by second on a clock of its own."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from coldframe.runtime.replica.headcount import RETRY_S, UP_S, Scaler
from coldframe.runtime.replica.scale_spec import Scale

DOWN_S = 10.0
SHARE = 100


class Simulation:
    """Workers that are there at once when they are wanted, and gone likewise."""

    def __init__(self, least: int = 1, most: int = 4) -> None:
        self.now = 1000.0
        self.scaler = Scaler(Scale(least, most), SHARE, DOWN_S, lambda: self.now)
        self.workers = least

    def look(self, load: int) -> int:
        self.workers = self.scaler.wanted(load, self.workers)
        return self.workers

    def seconds(self, loads: Iterable[int]) -> list[int]:
        """Their numbers, where each load is there for a second."""
        found = []
        for load in loads:
            found.append(self.look(load))
            self.now += 1
        return found


def test_there_are_as_few_as_may_be_where_there_is_little_to_do() -> None:
    assert set(Simulation(least=2).seconds([0, 10, SHARE, 2 * SHARE] * 5)) == {2}


def test_as_many_are_started_as_there_is_work_for_after_a_moment() -> None:
    assert Simulation().seconds([350, 350, 350]) == [1, 4, 4]


def test_there_are_never_more_than_may_be() -> None:
    assert Simulation().seconds([10**9] * 3) == [1, 4, 4]


def test_a_peak_that_is_over_starts_nothing() -> None:
    simulation = Simulation()
    assert set(simulation.seconds([900, 0] * 20)) == {1}
    simulation.look(900)
    simulation.now += UP_S / 2
    assert simulation.look(900) == 1
    simulation.now += UP_S / 2
    assert simulation.look(900) == 4


def test_they_go_when_fewer_would_have_done_for_long() -> None:
    simulation = Simulation()
    simulation.seconds([350] * 2)
    assert simulation.seconds([0] * 12) == [*[4] * 10, 1, 1]


def test_so_many_stay_as_the_busiest_moment_needed() -> None:
    simulation = Simulation()
    simulation.seconds([350] * 2)
    assert simulation.seconds([0] * 5 + [80] + [0] * 6)[-1] == 2


def test_none_goes_that_would_be_missed_at_once() -> None:
    simulation = Simulation()
    simulation.seconds([150] * 2)
    assert simulation.workers == 2
    # One worker would do, but only just.
    assert set(simulation.seconds([SHARE] * 60)) == {2}


def test_a_moment_of_work_begins_the_wait_anew() -> None:
    simulation = Simulation()
    simulation.seconds([350] * 2)
    assert set(simulation.seconds(([0] * 9 + [350]) * 5)) == {4}


def test_after_one_that_could_not_be_had_there_is_a_pause() -> None:
    simulation = Simulation()
    simulation.seconds([350] * 2)
    simulation.scaler.failed()
    simulation.workers = 1
    numbers = simulation.seconds([350] * 40)
    assert numbers == [1] * int(RETRY_S) + [4] * (40 - int(RETRY_S))


@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.integers(0, 1000), min_size=1, max_size=80),
)
def test_their_number_is_within_its_bounds_whatever_comes(
    least: int, more: int, loads: list[int]
) -> None:
    simulation = Simulation(least, least + more)
    found = simulation.seconds(loads)
    assert all(least <= number <= least + more for number in found)
    # In the end calm means the least, and a flood the most.
    assert simulation.seconds([0] * 25)[-1] == least
    assert simulation.seconds([10**6] * 3)[-1] == least + more
