"""The sampler against Transformers' logits processors and NumPy's Philox."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.sampling import (
    SampleInput,
    distribution,
    sample,
    uniform,
)

VOCAB = 200


def logits(seed: int, vocab: int = VOCAB, *, steps: float = 0.0) -> torch.Tensor:
    """Normal logits; with `steps` rounded to multiples of it, which makes ties."""
    values = 3 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    return (values / steps).round() * steps if steps else values


def request(
    params: SamplingParams,
    prompt: list[int] | None = None,
    generated: list[int] | None = None,
    position: int = 0,
) -> SampleInput:
    return SampleInput(params, prompt or [], generated or [], position)


def by_transformers(row: torch.Tensor, asked: SampleInput) -> torch.Tensor:
    """The same distribution by Transformers, in float64."""
    params = asked.params
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    ids = torch.tensor([[*asked.prompt_ids, *asked.generated_ids]], dtype=torch.long)
    result: torch.Tensor = steps(ids, row.double()[None])[0].softmax(-1)
    return result


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, *, ties: bool) -> None:
    if ties:  # which of equal tokens are kept at the edge of top-p is chance in Transformers
        ours, theirs = ours.sort().values, theirs.sort().values
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10**6),
    steps=st.sampled_from([0.0, 0.37, 2.1]),
    temperature=st.floats(0.05, 20.0),
    top_k=st.integers(0, VOCAB + 10),
    # Odd numbers, so that no sum of probabilities lands on the edge, where rounding would decide.
    top_p=st.sampled_from([1e-9, 0.1234567, 0.4321987, 0.7654321, 0.9517534, 0.9998763, 1.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.0473, 0.3217, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.7]),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    generated=st.lists(st.integers(0, VOCAB - 1), max_size=20),
)
def test_the_distribution_is_transformers(
    seed: int,
    steps: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    prompt: list[int],
    generated: list[int],
) -> None:
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    asked = request(params, prompt, generated)
    row = logits(seed, steps=steps)
    ours, theirs = distribution(row, asked), by_transformers(row, asked)
    assert ours.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert_same(ours, theirs, ties=steps > 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 30.0])
@pytest.mark.parametrize("steps", [0.0, 0.5])
def test_a_nucleus_beyond_the_first_thousand(temperature: float, steps: float) -> None:
    asked = request(SamplingParams(temperature=temperature, top_p=0.9517534))
    row = logits(1, 5000, steps=steps)
    assert_same(distribution(row, asked), by_transformers(row, asked), ties=steps > 0)


def test_at_the_edge_of_the_nucleus_the_lowest_of_equal_tokens_stay() -> None:
    row = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 1.0, 1.0, 0.0])
    weights = row.double().exp()
    top_p = ((weights[3] + 1.5 * weights[1]) / weights.sum()).item()
    got = distribution(row, request(SamplingParams(temperature=1.0, top_p=top_p)))
    assert got.nonzero()[:, 0].tolist() == [1, 3, 4]


def test_bias_comes_first_then_the_penalties() -> None:
    params = SamplingParams(
        temperature=1.0,
        logit_bias={0: 2.0, 1: -3.0},
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
    )
    row = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0])
    # 0: biased, in the prompt. 1: biased, generated three times. 3: generated once. 4: in the
    # prompt. Frequency and presence count what was generated alone.
    expected = torch.tensor(
        [3.0 / 2, -2.0 * 2 - 3 * 0.5 - 0.25, 1.0, -1.0 * 2 - 0.5 - 0.25, 0.0], dtype=torch.float64
    )
    got = distribution(row, request(params, [0, 4], [1, 3, 1, 1]))
    torch.testing.assert_close(got, expected.softmax(-1))
    assert row.tolist() == [1.0, 1.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-4),
        SamplingParams(temperature=5e-324),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_p=1e-300),
        SamplingParams(temperature=1.0, top_p=0.0),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=0.0, top_k=7, top_p=0.3),
    ],
)
def test_at_the_extremes_the_likeliest_token_is_left(params: SamplingParams) -> None:
    row = logits(3)
    expected = torch.nn.functional.one_hot(row.argmax(), VOCAB).double()
    assert distribution(row, request(params)).equal(expected)
    chosen = sample(row[None], [request(replace(params, seed=1))])
    assert chosen[0].token == row.argmax()


def test_at_the_other_extremes_all_tokens_are_left() -> None:
    row = logits(4)
    params = SamplingParams(temperature=1e300, top_k=10**9)
    torch.testing.assert_close(
        distribution(row, request(params)), torch.full_like(row, 1 / VOCAB, dtype=torch.float64)
    )


def test_masked_tokens_stay_masked() -> None:
    row = logits(5)
    row[10:] = -math.inf
    params = SamplingParams(temperature=2.0, top_k=50, repetition_penalty=1.5)
    assert not distribution(row, request(params, [3, 20])).count_nonzero() > 10
    assert distribution(row, request(params, [3, 20]))[10:].sum() == 0


@settings(deadline=None)
@given(seed=st.integers(0, (1 << 64) - 1), position=st.integers(0, 1 << 40))
def test_the_random_numbers_are_philox(seed: int, position: int) -> None:
    before = (position - 1) % (1 << 256)  # NumPy counts up before it draws
    words = [(before >> 64 * place) % (1 << 64) for place in range(4)]
    theirs = numpy.random.Philox(
        key=numpy.array([seed, 0], dtype=numpy.uint64),
        counter=numpy.array(words, dtype=numpy.uint64),
    )
    assert uniform(seed, position) == numpy.random.Generator(theirs).random()


def test_a_negative_seed_is_taken_modulo() -> None:
    assert uniform(-1, 5) == uniform((1 << 64) - 1, 5)


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over many positions of one seed, and over many seeds at one position."""
    params = SamplingParams(temperature=1.2, top_k=8, seed=42)
    row = logits(6, 50)
    asked = request(params)
    expected = distribution(row, asked)
    draws = 4000
    for sweep in (
        [replace(asked, position=place) for place in range(draws)],
        [replace(asked, params=replace(params, seed=seed)) for seed in range(draws)],
    ):
        drawn = [chosen.token for chosen in sample(row.expand(draws, -1), sweep)]
        counts = torch.bincount(torch.tensor(drawn), minlength=50).double()
        kept = expected > 0
        assert counts[~kept].sum() == 0
        chi_square = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum()
        # 7 degrees of freedom: one correct sampler in a million has more than 40.5. The seeds are
        # fixed, so the outcome is as well.
        assert chi_square < 40.5


def test_a_token_depends_on_its_own_row_alone() -> None:
    rows = torch.stack([logits(seed) for seed in range(6)])
    asked = [
        request(SamplingParams()),
        request(SamplingParams(temperature=0.8, seed=1), position=3),
        request(SamplingParams(temperature=1.5, top_p=0.9, seed=1), [1], [2], 9),
        request(SamplingParams(repetition_penalty=1.5), list(range(100)), [7]),
        request(SamplingParams(temperature=0.8, seed=2), position=3),
        request(SamplingParams(logprobs=2)),
    ]
    alone = [sample(row[None], [one])[0] for row, one in zip(rows, asked, strict=True)]
    assert sample(rows, asked) == alone
    assert sample(rows.flip(0), asked[::-1]) == alone[::-1]
    assert sample(rows, asked) == alone


def test_seeds_and_positions_make_a_difference() -> None:
    row = torch.zeros(1, 1000)
    params = SamplingParams(temperature=1.0)
    by_seed = [sample(row, [request(replace(params, seed=seed))])[0].token for seed in range(50)]
    by_position = [
        sample(row, [request(replace(params, seed=0), position=place)])[0].token
        for place in range(50)
    ]
    assert len(set(by_seed)) > 40
    assert len(set(by_position)) > 40


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    for vocab in (5, 1000, 152_064):
        row = torch.zeros(1, vocab)
        row[0, 3:] = 1.0
        assert sample(row, [request(SamplingParams())])[0].token == 3
        assert sample(row, [request(SamplingParams(logit_bias={0: 0.5}))])[0].token == 3


def test_greedy_with_penalties() -> None:
    row = torch.tensor([[2.0, 1.9, 0.0]])
    params = SamplingParams(repetition_penalty=1.2)
    assert sample(row, [request(params)])[0].token == 0
    assert sample(row, [request(params, [0])])[0].token == 1


def test_logprobs_are_the_models_own() -> None:
    rows = torch.stack([logits(8, steps=0.5), logits(9)])
    params = SamplingParams(temperature=0.5, top_k=1, logit_bias={17: 100.0}, seed=0, logprobs=5)
    reference = rows.double().log_softmax(-1)
    for row, chosen in zip(reference, sample(rows, [request(params)] * 2), strict=True):
        assert chosen.token == 17
        assert chosen.logprob == pytest.approx(row[17].item(), abs=1e-12)
        # A stable sort puts the lower ids first among ties.
        ids = row.sort(descending=True, stable=True).indices[:5]
        assert [token for token, _ in chosen.top] == ids.tolist()
        assert [value for _, value in chosen.top] == pytest.approx(row[ids].tolist(), abs=1e-12)


def test_logprobs_without_alternatives_and_with_too_few() -> None:
    row = torch.tensor([[0.0, -math.inf, 0.0]])
    bare = sample(row, [request(SamplingParams(logprobs=0))])[0]
    assert bare.logprob == pytest.approx(-math.log(2))
    assert bare.top == ()
    every = sample(row, [request(SamplingParams(logprobs=20))])[0]
    assert [token for token, _ in every.top] == [0, 2]
    assert sample(row, [request(SamplingParams())])[0].logprob is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, seed=0)])
def test_broken_logits_are_an_error_not_a_token(bad: float, params: SamplingParams) -> None:
    rows = torch.zeros(3, 10)
    rows[1, 4] = bad
    with pytest.raises(ReplicaError, match="not numbers") as caught:
        sample(rows, [request(params, position=place) for place in (5, 6, 7)])
    assert caught.value.where == "row 1 of the batch, position 6"


def test_nothing_but_minus_infinity_is_an_error() -> None:
    with pytest.raises(ReplicaError):
        sample(torch.full((1, 4), -math.inf), [request(SamplingParams())])


def test_sampling_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        sample(torch.zeros(1, 4), [request(SamplingParams(temperature=1.0))])
