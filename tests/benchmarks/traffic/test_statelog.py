from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from coldframe.benchmarks.traffic.played import Stay
from coldframe.benchmarks.traffic.statelog import changes, met, stays
from coldframe.loader.errors import PlatformError

WALL_S = 1_700_000_000.0


def line(wall_s: float, event: str, **more: object) -> str:
    moment = datetime.fromtimestamp(WALL_S + wall_s, UTC).isoformat(timespec="milliseconds")
    told = {"time": moment.replace("+00:00", "Z"), "process": "front", "event": event, **more}
    return json.dumps(told)


def test_states_are_read_from_a_log() -> None:
    told = [
        line(0.0, "state", **{"from": "zero", "to": "starting", "at_s": 10.0}),
        line(0.0, "state", **{"from": "starting", "to": "warm", "at_s": 12.5}),
        line(0.0, "ready", first_token_s=2.0),
        line(0.0, "state", **{"from": "warm", "to": "draining", "at_s": 14.0}),
        line(0.0, "state", **{"from": "draining", "to": "zero", "at_s": 14.25}),
        line(0.0, "zero"),
    ]
    words = "\n".join(["Warning: of somebody else", "{not even JSON", *told])
    found = changes(words, ["alone"])
    assert {change.model for change in found} == {"alone"}
    assert stays(found, 9.0, 10.0) == [
        Stay("zero", 0.0, 1.0),
        Stay("starting", 1.0, 3.5),
        Stay("warm", 3.5, 5.0),
        Stay("draining", 5.0, 5.25),
        Stay("zero", 5.25, 10.0),
    ]
    # A replay that begins later.
    assert [stay.state for stay in stays(found, 13.0, 1.1)] == ["warm", "draining"]


@pytest.mark.parametrize("words", ["", "Warning: of somebody else", line(0.0, "ready")])
def test_a_log_that_says_nothing_of_states_is_not_taken_for_zero(words: str) -> None:
    with pytest.raises(PlatformError, match="says nothing"):
        changes(words, ["alone"])


@pytest.mark.parametrize(
    ("at_s", "expected"),
    [(0.5, "zero"), (1.5, "zero"), (2.5, "warm"), (3.5, "parked"), (4.5, "parked"), (6.5, "zero")],
)
def test_what_a_request_met_is_what_its_model_was_about_to_be(at_s: float, expected: str) -> None:
    names = ["zero", "starting", "warm", "draining", "parked", "warm", "draining", "zero"]
    found = [Stay(name, float(n), float(n + 1)) for n, name in enumerate(names)]
    assert met(at_s, found) == expected


def test_who_asks_one_that_is_being_ended_has_it_started() -> None:
    assert met(0.5, [Stay("parked", 0.0, 1.0), Stay("zero", 1.0, 2.0)]) == "zero"
