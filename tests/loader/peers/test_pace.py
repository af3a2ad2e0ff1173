"""When a peer is given up. Times are said, not waited for."""

from __future__ import annotations

from coldframe.loader.peers.pace import Pace

MB = 1_000_000


def test_nothing_of_what_it_has() -> None:
    pace = Pace(still_s=20.0, waiting_s=60.0)
    assert pace.look(0.0, 10, 100) is None
    assert pace.look(10.0, 11, 100) is None
    assert pace.look(29.9, 11, 100) is None
    assert pace.look(30.0, 11, 100) == "the peer gave nothing for 20 s"


def test_one_that_waits_itself_is_given_more_time() -> None:
    pace = Pace(still_s=20.0, waiting_s=60.0)
    assert pace.look(0.0, 100, 100) is None
    assert pace.look(59.0, 100, 100) is None
    assert pace.look(60.0, 100, 100) == "the peer gave nothing for 60 s"


def test_one_that_says_nothing_is_not_waiting() -> None:
    pace = Pace(still_s=20.0)
    assert pace.look(0.0, 100, None) is None
    assert pace.look(20.0, 100, None) is not None


def test_a_trickle_after_a_stream() -> None:
    pace = Pace(window_s=10.0)
    ours = 0
    for second in range(0, 21, 2):
        assert pace.look(float(second), ours, 1000 * MB) is None
        ours += 40 * MB
    said = None
    for second in range(22, 60, 2):
        ours += 1 * MB
        said = said or pace.look(float(second), ours, 1000 * MB)
    assert said is not None
    assert "MB/s, and gave 20" in said


def test_a_trickle_of_a_peer_that_gets_no_more_itself() -> None:
    pace = Pace(window_s=10.0)
    ours = 0
    for second in range(0, 21, 2):
        assert pace.look(float(second), ours, ours + 5 * MB) is None
        ours += 40 * MB
    for second in range(22, 60, 2):
        ours += 1 * MB
        assert pace.look(float(second), ours, ours) is None


def test_one_that_was_never_fast_is_taken_as_it_is() -> None:
    pace = Pace(window_s=10.0)
    for second in range(0, 100, 2):
        assert pace.look(float(second), 1000 * second, 10 * MB) is None
