from __future__ import annotations

from dataclasses import dataclass

import pytest

from coldframe.runtime.worker.underway import Underway


@dataclass
class Computed:
    request: str
    left: int


@pytest.fixture
def underway() -> Underway[str]:
    return Underway(32)


def test_who_begins_alike_waits_until_it_is_there(underway: Underway[str]) -> None:
    assert not underway.wait("a", ["1", "2"])  # nobody computes that
    underway.begin(Computed("a", 70), ["1", "2"])
    assert underway.wait("b", ["1", "2"])
    assert underway.wait("c", ["1", "2", "3"])
    assert underway.end("a") == ["b", "c"]
    assert not underway.wait("d", ["1", "2"])
    assert underway.end("a") == []


def test_nobody_waits_longer_than_it_would_take_itself(underway: Underway[str]) -> None:
    long = Computed("a", 1000)
    underway.begin(long, [str(i) for i in range(31)])
    assert not underway.wait("b", ["0", "1"])
    assert underway.wait("c", [str(i) for i in range(16)])
    long.left = 100  # it has got on
    assert underway.wait("b", ["0", "1"])
    assert underway.end("a") == ["c", "b"]


def test_the_first_of_several_is_waited_for(underway: Underway[str]) -> None:
    underway.begin(Computed("a", 64), ["1"])
    underway.begin(Computed("b", 64), ["1", "2"])
    assert underway.wait("c", ["1"])
    assert underway.wait("d", ["1", "2", "3"])
    assert underway.end("b") == ["d"]
    assert underway.wait("e", ["1"])
    assert underway.end("a") == ["c", "e"]


def test_who_has_no_keys_never_waits(underway: Underway[str]) -> None:
    underway.begin(Computed("a", 10), [])
    assert not underway.wait("b", [])
    assert underway.end("unknown") == []
