"""From logits to the next token, without a state of its own.

The token at a position depends on its logits, the request's parameters, the token ids before it,
the seed and the position: on nothing else, and on nobody else in the batch. So whichever worker
draws it, before or after a hand-off or a crash, draws the same.

The order is: bias, penalties, temperature, top-k, top-p, min-p, one draw. Top-k, top-p and min-p
are defined as in Transformers, which keeps all ties at the edge of top-k; at the edge of top-p,
where it leaves them to an unstable sort, the lowest ids are kept here. Log-probabilities are
those of the model itself, of the logits before any of this.

Greedy rows stay on the device of the logits; rows to be sampled come to the CPU, in float64. All
that comes from a GPU comes with one wait.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.engine.device import fetch
from coldframe.runtime.engine.params import SamplingParams

__all__ = ["SampleInput", "Sampled", "SamplingParams", "distribution", "sample", "uniform"]


@dataclass(frozen=True, slots=True)
class SampleInput:
    """One row of a batch.

    Args:
        params: The request's parameters, with a seed unless the temperature is 0.
        prompt_ids: The token ids of the prompt.
        generated_ids: The token ids generated so far.
        position: The place in the sequence that the new token will have, counted from the first
            token of the prompt.
    """

    params: SamplingParams
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    position: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and what the model thought of it if the request asked.

    Args:
        token: Its id.
        logprob: Its natural log-probability under the unmodified logits.
        top: The likeliest tokens under the unmodified logits, likeliest first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: torch.Tensor, requests: Sequence[SampleInput]) -> list[Sampled]:
    """Choose the next token of each request.

    Args:
        logits: [S, vocab], float32, on any device.
        requests: S of them, in the order of the rows.

    Returns:
        S results. Of equally likely tokens a greedy request gets the one with the lowest id.

    Raises:
        ReplicaError: A row has no largest number: the model computed NaN or infinity.
    """
    # PyTorch documents that max gives the first of equal maxima; a NaN counts as the maximum. A
    # token's number is exact in float64, as a float32 is.
    largest, likeliest = logits.max(dim=-1)
    drawn = [row for row, asked in enumerate(requests) if not _is_plain_greedy(asked.params)]
    found, *rows = fetch(
        torch.stack((largest.double(), likeliest.double())), *(logits[row] for row in drawn)
    )
    heights, tokens = found.tolist()
    for row, height in enumerate(heights):
        if not math.isfinite(height):
            raise ReplicaError(
                "the model computed logits that are not numbers",
                where=f"row {row} of the batch, position {requests[row].position}",
                expected="finite logits",
                got=f"a maximum of {height}",
                hint="Check the checkpoint; a float16 model that overflows may need bfloat16.",
            )
    sampled = [Sampled(int(token)) for token in tokens]
    for row, its_logits in zip(drawn, rows, strict=True):
        sampled[row] = _sample_row(its_logits, requests[row])
    return sampled


def distribution(logits: torch.Tensor, request: SampleInput) -> torch.Tensor:
    """The probabilities that a request's next token is drawn from.

    Args:
        logits: [vocab], finite or -inf.
        request: The row's request.

    Returns:
        [vocab], float64, on the CPU; their sum is 1. At temperature 0 all of it is on one token.
    """
    params = request.params
    scores = logits.to("cpu", torch.float64)
    if params.changes_logits:
        scores = _penalised(scores, request)
    if params.temperature == 0:
        chosen = torch.zeros_like(scores)
        chosen[scores.argmax()] = 1.0
        return chosen
    # With the maximum at zero no temperature, however small, overflows, and the likeliest token
    # weighs exactly 1. The weights need no normalising until the end.
    weights = ((scores - scores.max()) / params.temperature).exp()
    if 0 < params.top_k < len(weights):
        weights[scores < scores.topk(params.top_k).values[-1]] = 0.0
    if params.top_p < 1:
        _keep_nucleus(weights, params.top_p)
    weights[weights < params.min_p] = 0.0
    return weights / weights.sum()


def uniform(seed: int, position: int) -> float:
    """One random number in [0, 1), a function of its arguments.

    Philox4x64-10 with the seed as its key and the position as its counter (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A counter needs no state to hand over.

    Args:
        seed: Any integer; taken modulo 2**64.
        position: At least 0.
    """
    mask = (1 << 64) - 1
    key = [seed & mask, 0]
    a, b, c, d = position & mask, 0, 0, 0
    for _ in range(10):
        first, second = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = (
            (second >> 64) ^ b ^ key[0],
            second & mask,
            (first >> 64) ^ d ^ key[1],
            first & mask,
        )
        # The golden ratio and the square root of three, less one, as Weyl sequences.
        key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
    return (a >> 11) * 2.0**-53


def _is_plain_greedy(params: SamplingParams) -> bool:
    return params.temperature == 0 and params.logprobs is None and not params.changes_logits


def _sample_row(logits: torch.Tensor, request: SampleInput) -> Sampled:
    params = request.params
    token = _draw(distribution(logits, request), request)
    if params.logprobs is None:
        return Sampled(token)
    logprobs = logits.double().log_softmax(dim=-1)
    return Sampled(token, float(logprobs[token]), _top(logprobs, params.logprobs))


def _draw(probabilities: torch.Tensor, request: SampleInput) -> int:
    if request.params.temperature == 0:
        return int(probabilities.argmax())
    if request.params.seed is None:
        raise ValueError("a sampled request needs a seed; see SamplingParams.with_seed")
    heights = probabilities.cumsum(dim=0)
    mark = heights[-1] * uniform(request.params.seed, request.position)
    # The first token whose height is above the mark; never one behind the last that has any
    # probability, should rounding have lifted the mark to the very top.
    token = torch.searchsorted(heights, mark, right=True)
    return int(torch.minimum(token, torch.searchsorted(heights, heights[-1])))


def _penalised(scores: torch.Tensor, request: SampleInput) -> torch.Tensor:
    params = request.params
    scores = scores.clone()
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias))
        scores[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float64)
    if params.repetition_penalty != 1:
        ids = torch.tensor(sorted({*request.prompt_ids, *request.generated_ids}), dtype=torch.long)
        seen = scores[ids]
        penalty = params.repetition_penalty
        scores[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(request.generated_ids)
        ids = torch.tensor(list(counts), dtype=torch.long)
        times = torch.tensor(list(counts.values()), dtype=torch.float64)
        scores[ids] -= params.frequency_penalty * times + params.presence_penalty
    return scores


def _keep_nucleus(weights: torch.Tensor, top_p: float) -> None:
    """Zero all but the nucleus: a token stays while those ahead of it have less than top_p.

    Of equal tokens at the edge those with the lowest ids stay, as the greedy choice would have it.
    Sorting 150 000 weights takes ten milliseconds; the
    nucleus is nearly always among the first thousand, which take half of one.
    """
    goal = top_p * weights.sum()
    count = min(1024, len(weights))
    head = weights.topk(count).values
    heights = head.cumsum(dim=0)
    if heights[-1] < goal and count < len(weights):
        head = weights.sort(descending=True).values
        heights = head.cumsum(dim=0)
    size = 1 + int((heights[:-1] < goal).sum())
    edge = head[size - 1]
    ties = (weights == edge).nonzero()[:, 0]
    above = int((weights > edge).sum())
    weights[weights < edge] = 0.0
    weights[ties[size - above :]] = 0.0


def _top(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    if count == 0:
        return ()
    # topk leaves the order of ties open: take all that reach its last value, then the lowest ids.
    floor = logprobs.topk(min(count, len(logprobs))).values[-1]
    ids = (logprobs >= floor).nonzero()[:, 0].tolist()
    found = sorted((-float(logprobs[token]), token) for token in ids)
    return tuple((token, -negative) for negative, token in found[:count] if negative < math.inf)
