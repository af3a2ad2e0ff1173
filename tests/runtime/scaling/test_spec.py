"""The texts that name a policy."""

from __future__ import annotations

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.scaling.histogram import HybridHistogram
from coldframe.runtime.scaling.next import NextArrival
from coldframe.runtime.scaling.spec import policy_from


def test_what_they_name() -> None:
    fixed = policy_from("fixed:300,never")().idle(0.0)
    assert fixed.steps == ((0.0, "warm"), (300.0, "parked"))
    assert policy_from("fixed:never")().idle(0.0).steps == ((0.0, "warm"),)
    make = policy_from("histogram:bin=60,range=3600,keep=900,rest=parked")
    one, other = make(), make()
    assert one is not other
    assert isinstance(one, HybridHistogram)
    assert (len(one.histogram.counts), one.histogram.bin_s, one.parks) == (60, 60.0, True)
    assert one.idle(0.0).steps == ((0.0, "warm"), (900.0, "zero"))
    next_one = policy_from("next:penalty=100,parked=1,zero=3,parked_start=0.5,samples=4")()
    assert isinstance(next_one, NextArrival)
    assert next_one.costs.penalty == 100
    assert next_one.costs.start_s == {"zero": 3.0, "parked": 0.5, "warm": 0.0}
    assert not next_one.parks
    assert policy_from("next")().parks
    assert policy_from("histogram")().name == "histogram"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "best",
        "fixed",
        "fixed:",
        "fixed:-1",
        "fixed:nan",
        "fixed:inf",
        "fixed:1,2,3",
        "histogram:",
        "histogram:bin",
        "histogram:bin=0",
        "histogram:bin=x",
        "histogram:bin=1,bin=2",
        "histogram:bin=0.001",
        "histogram:head=99,tail=5",
        "histogram:rest=warm",
        "histogram:rest=zero,rest=parked",
        "histogram:samples=1.5",
        "histogram:penalty=3",
        "next:penalty=0",
        "next:parked=2",
        "next:bin=3",
    ],
)
def test_what_names_none_is_refused(text: str) -> None:
    with pytest.raises(RequestError) as raised:
        policy_from(text, "--which")
    assert raised.value.where == "--which"
    assert raised.value.hint
