from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldframe.benchmarks.document import SCHEMA
from coldframe.benchmarks.traffic.goodput import Objectives, account, is_good, spread
from coldframe.benchmarks.traffic.open_loop import Record

WANTED = Objectives(0.5, 0.1)


def record(
    due: float = 0.0,
    sent: float | None = None,
    times: tuple[float, ...] = (0.2, 0.25, 0.3),
    *,
    status: int | None = 200,
    tokens: int | None = None,
    whole: bool = True,
    error: str | None = None,
) -> Record:
    sent = due if sent is None else sent
    return Record(
        due,
        16,
        3,
        sent,
        [sent + time for time in times],
        sent + times[-1] if whole else None,
        len(times) if tokens is None else tokens,
        status,
        error,
    )


GAPS = st.lists(st.floats(0, 0.5), min_size=2, max_size=2)


@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 2), GAPS), min_size=1, max_size=30))
def test_latencies_are_numpys(seen: list[tuple[float, float, list[float]]]) -> None:
    records = [
        record(due, times=(first, first + gaps[0], first + gaps[0] + gaps[1]))
        for due, first, gaps in sorted(seen, key=lambda one: one[0])
    ]
    found = account([records], WANTED)
    own = {
        "ttft": [one.token_s[0] - one.sent_s for one in records],
        "itl": np.concatenate([np.diff(one.token_s) for one in records]),
        "tpot": [(one.token_s[-1] - one.token_s[0]) / 2 for one in records],
        "e2e": [one.token_s[-1] - one.sent_s for one in records],
    }
    for name, values in own.items():
        assert found[name]["count"] == len(values)
        assert found[name]["mean"] == pytest.approx(np.mean(values), abs=1e-9)
        for percent in (50, 90, 99):
            expected = np.percentile(values, percent)
            assert found[name][f"p{percent}"] == pytest.approx(expected, abs=1e-9)
        assert found[name]["max"] == pytest.approx(np.max(values))
    over = max(one.token_s[-1] for one in records)
    assert found["seconds"] == pytest.approx(max(over, 1e-9))
    assert found["tokens_rate"] == pytest.approx(3 * len(records) / max(over, 1e-9))


def test_what_became_of_requests_is_counted_once() -> None:
    load = [
        record(),
        record(1.0, status=429, times=(0.1,), whole=False, tokens=0, error="full"),
        record(2.0, status=503, times=(0.1,), whole=False, tokens=0, error="cold"),
        record(3.0, status=None, times=(0.1,), whole=False, tokens=0, error="reset"),
        record(4.0, times=(0.2, 0.3), whole=False, error="the answer broke off"),
        record(5.0, tokens=2),
        record(6.0, times=(0.7, 0.75, 0.8)),
    ]
    found = account([load], WANTED)
    counts = [found[name] for name in ("requests", "answered", "refused", "failed", "wrong")]
    assert counts == [7, 2, 2, 2, 1]
    assert found["errors"] == ["cold", "full", "reset", "the answer broke off"]
    assert (found["goodput"]["good"], found["goodput"]["share"]) == (1, 1 / 7)
    assert found["goodput"]["rate"] == pytest.approx(1 / 6.8)
    assert found["answer_tokens"] == 6
    assert found["offered_rate"] == pytest.approx(7 / 6)
    schema = json.loads(SCHEMA.read_text())
    jsonschema.validate(found, {"$ref": "#/$defs/serve_account", "$defs": schema["$defs"]})


def test_where_nothing_came_there_are_no_latencies() -> None:
    found = account([[record(status=503, times=(0.1,), whole=False, tokens=0)]], WANTED)
    assert found["ttft"] is found["itl"] is found["e2e"] is None
    assert spread([]) is None
    assert found["goodput"]["share"] == 0


def test_loads_are_counted_together_each_for_as_long_as_it_took() -> None:
    found = account([[record(0.7)], [record(1.7)]], WANTED)
    assert found["seconds"] == pytest.approx(3.0)
    assert found["goodput"]["rate"] == pytest.approx(2 / 3.0)


def test_a_request_is_good_if_both_its_objectives_are_met() -> None:
    slow_once = (0.2, 0.21, 0.38)  # 10 ms, 170 ms
    assert is_good(record(), WANTED)
    assert not is_good(record(times=(0.6, 0.61, 0.62)), WANTED)
    assert not is_good(record(times=(0.2, 0.35, 0.5)), WANTED)
    assert is_good(record(times=slow_once), WANTED)
    assert is_good(record(times=slow_once), Objectives(0.5, 0.1, 0.5))
    assert not is_good(record(times=slow_once), Objectives(0.5, 0.1, 1.0))
    alone = Record(0.0, 16, 1, 0.0, [0.2], 0.2, 1, 200)
    assert is_good(alone, WANTED)
    assert is_good(alone, Objectives(0.5, 0.1, 1.0))


def test_a_client_that_is_late_is_told_apart_from_a_slow_server() -> None:
    late = account([[record(due, due + 0.05) for due in (1.0, 2.0)]], WANTED)
    assert late["client_late"]
    assert late["lateness"]["p50"] == pytest.approx(0.05)
    assert late["ttft"]["p50"] == pytest.approx(0.2)
    assert not account([[record(1.0)]], WANTED)["client_late"]
