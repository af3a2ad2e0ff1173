"""Our sampler over vLLM's rows, held against the native one; without vLLM."""

from __future__ import annotations

import random

import pytest
import torch

from coldframe.loader.errors import ReplicaError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.sampling import SampleInput, sample
from coldframe.runtime.integrations.vllm.params import ask
from coldframe.runtime.integrations.vllm.sampler_rows import Row, Rows, row_of
from coldframe.runtime.worker.handoff import Job

VOCAB = 500
ASKED = {
    "seeded": {"temperature": 0.8, "seed": 7},
    "narrow": {"temperature": 1.3, "top_k": 40, "top_p": 0.7, "min_p": 0.02, "seed": 2**64 - 1},
    "greedy-penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.7},
    "penalties": {"temperature": 1.0, "presence_penalty": 1.5, "seed": -4},
    "bias": {"logit_bias": {3: 4.0, 9: -100.0}, "temperature": 0.5, "seed": 1},
}


def row(job: Job, made: list[int]) -> Row | None:
    asked = ask(job, ())
    return row_of(asked.sampling.get("extra_args"), asked.prompt_token_ids, made)


@pytest.mark.parametrize("name", ASKED)
def test_the_cut_makes_no_difference(name: str) -> None:
    """An answer of 24 tokens, taken over behind each of them, draws what the native engine does."""
    params = SamplingParams(max_tokens=24, **ASKED[name])  # type: ignore[arg-type]
    prompt = (5, 3, 9, 3)
    logits = torch.randn(24, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    native: list[int] = []
    for step in logits:
        inputs = [SampleInput(params, prompt, native, len(prompt) + len(native))]
        native.append(sample(step[None], inputs)[0].token)
    assert len(set(native)) > 3
    for cut in range(24):
        made: list[int] = []
        rows = Rows()
        rows.put(0, row(Job("r", 0, params, None, prompt, tuple(native[:cut])), made))
        for step in logits[cut:]:
            left = rows.leave(step[None].clone())
            assert int((left > float("-inf")).sum()) == 1
            made.append(int(left.argmax()))
        assert native[:cut] + made == native, f"cut behind {cut}"


def test_a_batch_that_comes_and_goes() -> None:
    """Rows follow their requests, whatever moves; the others stay as they are."""
    dice = random.Random(5)
    rows, model = Rows(), {}  # type: ignore[var-annotated]
    for step in range(200):
        logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(step))
        index, other = dice.sample(range(8), 2)
        match dice.choice(["remove", "add", "add", "foreign", "move", "swap"]):
            case "remove":
                rows.remove(index)
                model.pop(index, None)
            case "add":
                params = SamplingParams(temperature=1.0, seed=step, max_tokens=9)
                job = Job(str(step), 0, params, None, (1, 2, step))
                rows.put(index, row(job, []))
                model[index] = SampleInput(params, (1, 2, step), [], 3)
            case "foreign":
                rows.put(index, row(Job("g", 0, SamplingParams(), None, (1,)), []))
                model.pop(index, None)
            case "move":
                rows.move(index, other, swap=False)
                moved = model.pop(index, None)
                model.pop(other, None)
                if moved is not None:
                    model[other] = moved
            case "swap":
                rows.move(index, other, swap=True)
                first, second = model.pop(index, None), model.pop(other, None)
                model.update({i: r for i, r in ((other, first), (index, second)) if r is not None})
        assert len(rows) == len(model)
        left = rows.leave(logits.clone())
        for place in range(8):
            if place in model:
                (drawn,) = sample(logits[place : place + 1], [model[place]])
                assert int(left[place].argmax()) == drawn.token
                assert int((left[place] > float("-inf")).sum()) == 1
            else:
                assert torch.equal(left[place], logits[place])


def test_known_tokens_are_made_again() -> None:
    """A grammar gets the tokens that the client has; behind them it is drawn as ever."""
    made: list[int] = []
    known = Row(SamplingParams(temperature=1.0, seed=4), (1, 2, 3), 3, made, (7, 8))
    rows = Rows()
    rows.put(0, known)
    logits = torch.randn(3, 1, VOCAB, generator=torch.Generator().manual_seed(1))
    for step in logits:
        made.append(int(rows.leave(step.clone()).argmax()))
    wanted = SampleInput(SamplingParams(temperature=1.0, seed=4), (1, 2, 3), (7, 8), 5)
    assert made == [7, 8, sample(logits[2], [wanted])[0].token]


def test_known_tokens_of_a_request_that_vllm_samples() -> None:
    made: list[int] = []
    rows = Rows()
    rows.put(0, Row(None, (1, 2), 2, made, (7,)))
    logits = torch.randn(1, VOCAB)
    assert int(rows.leave(logits.clone()).argmax()) == 7
    made.append(7)
    assert torch.equal(rows.leave(logits.clone()), logits)


def test_a_token_that_is_not_known_yet_is_not_guessed() -> None:
    rows = Rows()
    rows.put(0, Row(SamplingParams(temperature=1.0, seed=4), (1, 2), 2, [3, -1], ()))
    with pytest.raises(ReplicaError, match="async_scheduling"):
        rows.leave(torch.randn(1, VOCAB))


def test_another_version_is_refused() -> None:
    with pytest.raises(ReplicaError, match="version"):
        row_of({"coldframe": {"version": 99}}, (), ())
