"""What clones of an image must answer: a short prompt's greedy tokens, and how likely they are.

The answer is recorded once, when the image is made, and replayed before an image is trusted again.
Kernels differ a little from one CPU to the next, so log-probabilities are compared within a
tolerance, and at a tie closer than that either token will do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.replica.answers import Listener, TokenEvent

__all__ = ["OracleRun", "compare"]

_TOKENS = 8
_TOLERANCE = 0.5
"""In nats; in bf16 a CPU's eager kernels were seen 0.3 apart (for one sequence and for three),
compiled steps and eager ones 0.4. Another model is several apart."""


class OracleRun:
    """The prompt on its way.

    Args:
        submit: Takes parameters, a listener and the prompt's ids, and gives the request's id.
        vocab_size: The model's.
        recorded: The manifest's oracle, to be held against; None where this is the first answer.
        then: Called when there is an answer, or an error.

    Attributes:
        error: Why there is no answer, or how it differs.
        answer: Prompt ids, token ids and log-probabilities, as the manifest keeps them.
        request: The request's id.
    """

    def __init__(
        self,
        submit: Callable[[SamplingParams, Listener, tuple[int, ...]], str],
        vocab_size: int,
        recorded: dict[str, Any] | None,
        then: Callable[[], None],
    ) -> None:
        self.error: ColdframeError | None = None
        self.answer: dict[str, Any] = {}
        self._recorded = recorded
        self._then = then
        self._events: list[TokenEvent] = []
        if recorded is None:
            self._prompt_ids = prompt_for(vocab_size)
        else:
            self._prompt_ids = tuple(recorded["prompt_ids"])
        params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True, logprobs=2)
        self.request = submit(params, self, self._prompt_ids)

    def on_token(self, event: TokenEvent) -> None:
        self._events.append(event)
        if event.finish is None:
            return
        self.answer = {
            "prompt_ids": list(self._prompt_ids),
            "token_ids": [event.token for event in self._events],
            "logprobs": [event.logprob for event in self._events],
        }
        if self._recorded is not None:
            self.error = compare(self._recorded, self._events)
        self._then()

    def on_error(self, error: ColdframeError) -> None:
        self.error = error
        self._then()


def prompt_for(vocab_size: int) -> tuple[int, ...]:
    """Sixteen ids all over a vocabulary, always the same."""
    return tuple((7919 * i + 104729) % vocab_size for i in range(1, 17))


def compare(recorded: dict[str, Any], events: list[TokenEvent]) -> SnapshotError | None:
    """Holds an answer against the recorded one.

    Args:
        recorded: The manifest's oracle.
        events: The answer, with the two likeliest tokens of each position.

    Returns:
        How they differ; None where they do not.
    """
    tokens, logprobs = recorded["token_ids"], recorded["logprobs"]
    if not len(tokens) == len(logprobs) == len(events):
        return _differs("length", f"{len(tokens)} and {len(logprobs)}", len(events))
    wanted = zip(tokens, logprobs, strict=True)
    for place, ((token, logprob), event) in enumerate(zip(wanted, events, strict=True)):
        # Written so that a NaN is not close to anything.
        if event.logprob is None or not abs(event.logprob - logprob) <= _TOLERANCE:
            return _differs(f"log-probability {place}", logprob, event.logprob)
        if event.token != token:
            likely = dict(event.top)
            if token in likely and abs(likely[token] - event.logprob) <= _TOLERANCE:
                return None  # a tie, behind which the texts are different ones
            return _differs(f"token {place}", token, event.token)
    return None


def _differs(where: str, expected: object, got: object) -> SnapshotError:
    return SnapshotError(
        "a clone does not answer as its image must",
        where=where,
        expected=expected,
        got=got,
        hint="Make the image again: `coldframe snapshot remove`, then `create`.",
    )
