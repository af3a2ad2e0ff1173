from __future__ import annotations

import pytest

from coldframe.loader.errors import RequestError
from coldframe.runtime.replica.scale_spec import MOST_WORKERS, Scale


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("1", Scale(1, 1)),
        ("3", Scale(3, 3)),
        ("1-4", Scale(1, 4)),
        ("2-2", Scale(2, 2)),
        (" 1-4@cpu ", Scale(1, 4, "cpu")),
        ("2@cuda", Scale(2, 2, "cuda:0")),
        ("1-2@cuda:13", Scale(1, 2, "cuda:13")),
        (f"1-{MOST_WORKERS}", Scale(1, MOST_WORKERS)),
    ],
)
def test_what_it_says(text: str, scale: Scale) -> None:
    assert Scale.parse(text) == scale
    assert scale.fixed == (scale.least == scale.most)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "-", "1-", "-1", "1-2-3", "1.5", "1 - 2", "1e3", "+1", "1@cpu@cpu", "@cpu"),
        *("0", "0-3", "4-1", "1-257", "999999999", "9999999999", "\u0661", "1_0", "1\n2"),
        *("1@", "1@CPU", "1@gpu", "1@cuda:", "1@cuda:x", "1@cpu,cpu", "1@cuda:0,1"),
        *("1@auto", "1@cuda:-1", "1@cuda:99999"),
    ],
)
def test_what_it_does_not(text: str) -> None:
    with pytest.raises(RequestError) as raised:
        Scale.parse(text, "--prefill")
    assert raised.value.where == "--prefill"


def test_a_number_is_a_scale_too() -> None:
    assert Scale.of(2) == Scale(2, 2)
    assert Scale.of(Scale(1, 3)) == Scale(1, 3)
