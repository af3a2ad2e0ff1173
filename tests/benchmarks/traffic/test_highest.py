from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coldframe.benchmarks.traffic.highest import highest_rate


@given(st.floats(0.5, 50), st.floats(1, 8))
def test_the_rate_is_found_from_wherever_the_search_begins(limit: float, start: float) -> None:
    found, probes = highest_rate(lambda rate: 1.0 if rate <= limit else 0.2, start, 0.9, 0.1)
    assert found is not None
    assert limit / 1.1 <= found <= limit
    assert found in [probe.rate for probe in probes]
    assert all((probe.share >= 0.9) == (probe.rate <= limit) for probe in probes)


def test_where_no_rate_is_low_enough_there_is_none() -> None:
    found, probes = highest_rate(lambda rate: 0.5, 4.0, 0.9, 0.1)
    assert found is None
    assert [probe.rate for probe in probes] == [4, 2, 1, 0.5, 0.25]


def test_where_every_rate_is_served_well_the_search_ends() -> None:
    found, probes = highest_rate(lambda rate: 1.0, 1.0, 0.9, 0.1)
    assert found == 2.0**6
    assert len(probes) == 7
