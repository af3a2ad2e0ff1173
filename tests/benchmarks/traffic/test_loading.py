from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from coldframe.benchmarks.traffic.simulate import Setup, simulate
from coldframe.benchmarks.traffic.stages import Line, Times
from coldframe.benchmarks.traffic.traces import Arrival
from coldframe.runtime.scaling.policies import FixedKeepAlive, LivePolicy

TIMES = Times([4.0], [], [], [], Line(0, 0), Line(0, 0), "made up", beside=1.0)


def forever() -> LivePolicy:
    return FixedKeepAlive(None)


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        # They have a half each from 1 to 7: the first has 3 s to go then, the second 4.
        (1.0, [7.0, 7.0]),
        (0.0, [4.0, 4.0]),
        # 3 s of the first take 4.5; meanwhile 3 of the second's are done, and the last goes alone.
        (0.5, [5.5, 5.5]),
    ],
)
def test_starts_at_the_same_time_share(beside: float, expected: list[float]) -> None:
    policy: Callable[[], LivePolicy] = forever
    world = Setup(("a", "b"), replace(TIMES, beside=beside), policy, begin="zero")
    arrivals = [Arrival(0.0, 1, 1), Arrival(1.0, 1, 1)]
    played = simulate(arrivals, [0, 1], world)
    assert [asked.ttft_s for asked in played.asked] == pytest.approx(expected)


def test_three_have_a_third_each() -> None:
    world = Setup(("a", "b", "c"), TIMES, forever, begin="zero")
    played = simulate([Arrival(0.0, 1, 1)] * 3, [0, 1, 2], world)
    assert [asked.ttft_s for asked in played.asked] == pytest.approx([12.0] * 3)


def test_nothing_is_decoded_before_somebody_decodes() -> None:
    times = replace(TIMES, decode=Line(0.1, 0.0), behind=[0.5])
    world = Setup(("a",), times, forever, begin="zero")
    played = simulate([Arrival(0.0, 1, 11), Arrival(20.0, 1, 11)], [0, 0], world)
    assert played.seconds == pytest.approx(21.0)
    alone = simulate([Arrival(0.0, 1, 11)], [0], world)
    assert alone.seconds == pytest.approx(4.0 + 0.5 + 1.0)
