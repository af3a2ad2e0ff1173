"""Replicas on a GPU as benchmarks drive them: asked once, timed by their own clock."""

from __future__ import annotations

import time
from typing import Any

from coldframe.loader.errors import ColdframeError, PlatformError
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.answers import TokenEvent
from coldframe.runtime.replica.replica import Replica

__all__ = ["PROMPT", "Answer", "ask", "options"]

PROMPT = tuple(5 + (7 * i) % 997 for i in range(64))


class Answer:
    """An answer as it comes.

    Attributes:
        asked: When it was asked for, by `time.monotonic`.
        times: When each token came.
        tokens: The tokens' ids.
    """

    def __init__(self) -> None:
        self.asked = time.monotonic()
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._done = False
        self._error: ColdframeError | None = None

    def on_token(self, event: TokenEvent) -> None:
        self.times.append(time.monotonic())
        self.tokens.append(event.token)
        self._done = event.finish is not None

    def on_error(self, error: ColdframeError) -> None:
        self._error, self._done = error, True

    @property
    def ttft_s(self) -> float:
        """From the question to the first token, in seconds."""
        return self.times[0] - self.asked

    @property
    def rate(self) -> float:
        """Tokens per second behind the second, which the hand-off is before."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])

    def wait(self, replica: Replica, seconds: float) -> Answer:
        """Waits for its end.

        Raises:
            ColdframeError: It has none, or not within so many seconds.
        """
        deadline = time.monotonic() + seconds
        while not self._done:
            if replica.error is not None:
                raise replica.error
            if time.monotonic() > deadline:
                raise PlatformError("an answer does not come", got=f"{len(self.tokens)} tokens")
            replica.poll(0.05)
        if self._error is not None:
            raise self._error
        return self


def ask(replica: Replica, count: int, shift: int = 0) -> Answer:
    """Asks for so many greedy tokens.

    Args:
        replica: Whom.
        count: How many.
        shift: Makes the prompt another one, whose KV is not there yet.
    """
    answer = Answer()
    prompt = tuple(token + shift for token in PROMPT)
    replica.submit(SamplingParams(max_tokens=count, ignore_eos=True), answer, prompt_ids=prompt)
    return answer


def options(model: str, device: str, **more: Any) -> ReplicaOptions:
    """A replica with all of it on one GPU, for which no CPU stands in."""
    return ReplicaOptions(model=model, device=device, **more)
