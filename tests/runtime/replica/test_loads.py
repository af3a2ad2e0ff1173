from __future__ import annotations

import pytest

from coldframe.runtime.replica.loads import TextGauge, blocks_of


def test_a_text_has_a_quarter_as_many_tokens_as_characters_until_more_is_known() -> None:
    gauge = TextGauge()
    assert gauge.guess("x" * 400) == 100
    assert gauge.guess("") == gauge.guess("x") == 1


@pytest.mark.parametrize("characters", [1, 2, 9])
def test_it_learns_what_a_token_is(characters: int) -> None:
    gauge = TextGauge()
    for _ in range(20):
        gauge.learn("x" * (200 * characters), 200)
    assert gauge.guess("x" * (1000 * characters)) == pytest.approx(1000, rel=0.2)


def test_what_is_long_ago_counts_less_and_less() -> None:
    gauge = TextGauge()
    gauge.learn("x" * 1_000_000, 250_000)
    for _ in range(100):
        gauge.learn("語" * 10_000, 10_000)
    assert gauge.guess("語" * 1000) == pytest.approx(1000, rel=0.05)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (32, 1), (33, 2), (2000, 63)])
def test_a_block_counts_as_a_whole(tokens: int, blocks: int) -> None:
    assert blocks_of(tokens) == blocks
