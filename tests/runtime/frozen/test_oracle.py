"""What clones must answer: recorded, replayed, and held against what was recorded."""

from __future__ import annotations

from typing import Any

import pytest

from coldframe.loader.errors import ColdframeError, ReplicaError, SnapshotError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.frozen.oracle import OracleRun, compare, prompt_for
from coldframe.runtime.replica.answers import Listener, TokenEvent

TOKENS = (5, 9, 2)
LOGPROBS = (-0.5, -1.25, -2.0)


def recorded(tokens: tuple[int, ...] = TOKENS, logprobs: tuple[float, ...] = LOGPROBS) -> Any:
    return {"prompt_ids": [1, 2], "token_ids": list(tokens), "logprobs": list(logprobs)}


def event(place: int, token: int, logprob: float | None, other: float = -9.0) -> TokenEvent:
    """A token with its log-probability; the next likeliest is token 77."""
    finish = "length" if place == len(TOKENS) - 1 else None
    top = ((token, logprob or 0.0), (77, other))
    return TokenEvent(place, token, "", finish, logprob, top)


def events(tokens: tuple[int, ...] = TOKENS, logprobs: Any = LOGPROBS) -> list[TokenEvent]:
    pairs = zip(tokens, logprobs, strict=True)
    return [event(place, token, logprob) for place, (token, logprob) in enumerate(pairs)]


class Worker:
    """Takes one request; the test says what comes of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[SamplingParams, tuple[int, ...]]] = []
        self.listener: Listener | None = None

    def submit(self, params: SamplingParams, listener: Listener, ids: tuple[int, ...]) -> str:
        self.asked.append((params, ids))
        self.listener = listener
        return "r1"


# -- the prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [2, 500, 150_000])
def test_the_prompt_is_always_the_same_and_within_the_vocabulary(vocab: int) -> None:
    ids = prompt_for(vocab)
    assert ids == prompt_for(vocab)
    assert len(ids) == 16
    assert all(0 <= token < vocab for token in ids)
    assert len(set(ids)) == min(vocab, 16)


def test_the_first_answer_is_kept_as_a_manifest_has_it() -> None:
    worker, done = Worker(), []
    run = OracleRun(worker.submit, 500, None, lambda: done.append(1))
    ((params, ids),) = worker.asked
    assert (ids, run.request) == (prompt_for(500), "r1")
    assert (params.temperature, params.ignore_eos, params.logprobs) == (0.0, True, 2)
    for told in events():
        assert not done
        run.on_token(told)
    assert (done, run.error) == ([1], None)
    assert run.answer == {**recorded(), "prompt_ids": list(ids)}


def test_a_recorded_prompt_is_asked_again() -> None:
    worker, done = Worker(), []
    run = OracleRun(worker.submit, 500, recorded(), lambda: done.append(1))
    assert worker.asked[0][1] == (1, 2)
    for told in events(tokens=(5, 9, 3)):
        run.on_token(told)
    assert done == [1]
    assert isinstance(run.error, SnapshotError)
    assert (run.error.where, run.error.expected, run.error.got) == ("token 2", "2", "3")


def test_a_request_that_fails_is_no_answer() -> None:
    worker, done = Worker(), []
    run = OracleRun(worker.submit, 500, recorded(), lambda: done.append(1))
    error: ColdframeError = ReplicaError("it is gone")
    run.on_error(error)
    assert (done, run.error, run.answer) == ([1], error, {})


# -- compared ------------------------------------------------------------------------------------


def test_the_same_is_the_same_within_what_kernels_differ_by() -> None:
    assert compare(recorded(), events()) is None
    assert compare(recorded(), events(logprobs=(-0.55, -1.2, -2.09))) is None


@pytest.mark.parametrize(
    ("answer", "where"),
    [
        (events(logprobs=(-0.5, -1.25, -2.6)), "log-probability 2"),
        (events(logprobs=(-0.5, None, -2.0)), "log-probability 1"),
        (events(tokens=(6, 9, 2)), "token 0"),
        (events()[:2], "length"),
        ([], "length"),
    ],
)
def test_what_differs_is_named(answer: list[TokenEvent], where: str) -> None:
    error = compare(recorded(), answer)
    assert error is not None
    assert error.where == where
    assert "coldframe snapshot" in error.hint


@pytest.mark.parametrize(
    "oracle", [recorded(tokens=(5, 9)), recorded(logprobs=(-0.5,)), recorded((), ())]
)
def test_a_recorded_answer_that_is_not_whole_fits_nothing(oracle: dict[str, Any]) -> None:
    error = compare(oracle, events())
    assert error is not None
    assert error.where == "length"


def test_not_a_number_is_no_log_probability() -> None:
    assert compare(recorded(), events(logprobs=(-0.5, float("nan"), -2.0))) is not None


def test_at_a_tie_either_token_will_do() -> None:
    tie = [event(0, 5, -0.5), event(1, 77, -1.2, other=-1.2)]
    tie[1] = TokenEvent(1, 8, "", None, -1.2, ((8, -1.2), (9, -1.25)))
    # What follows the other token is another text.
    assert compare(recorded(), [*tie, event(2, 400, -2.0)]) is None
    apart = TokenEvent(1, 8, "", None, -1.2, ((8, -1.2), (9, -1.8)))
    error = compare(recorded(), [tie[0], apart, event(2, 2, -2.0)])
    assert error is not None
    assert error.where == "token 1"
