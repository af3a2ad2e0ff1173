"""How long to wait after a death, and which deaths are a loop."""

from __future__ import annotations

from itertools import pairwise

import pytest

from coldframe.runtime.endpoint import relapses
from coldframe.runtime.endpoint.relapses import Relapses


def test_the_first_death_is_answered_at_once_and_each_further_one_later() -> None:
    deaths = Relapses()
    waits = []
    for _ in range(12):
        deaths.died()
        waits.append(deaths.wait_s)
    assert waits[0] == 0
    assert all(0 < less < more for less, more in pairwise(waits[1:9]))
    assert waits[-1] <= 60
    assert deaths.too_many


def test_three_are_a_loop_and_five_too_many() -> None:
    deaths = Relapses()
    seen = []
    for _ in range(5):
        deaths.died()
        seen.append((deaths.looping, deaths.too_many))
    assert seen == [(False, False)] * 2 + [(True, False)] * 2 + [(True, True)]
    deaths.forget()
    assert (deaths.count, deaths.looping) == (0, False)


def test_who_was_warm_for_long_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    deaths = Relapses()
    for _ in range(4):
        deaths.died()
    deaths.warm()
    deaths.died()
    assert deaths.count == 5
    monkeypatch.setattr(relapses, "_STABLE_S", 0.0)
    deaths.warm()
    deaths.died()
    assert (deaths.count, deaths.wait_s) == (1, 0)


def test_a_loop_that_begins_after_long_warmth_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relapses, "_STABLE_S", 0.0)
    deaths = Relapses()
    deaths.warm()
    for _ in range(3):  # none of them is warm again
        deaths.died()
    assert deaths.looping
    assert deaths.wait_s > 0
