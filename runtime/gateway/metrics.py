"""What the gateway counts: plain numbers on the way of a token, and text when somebody scrapes.

Names are vLLM's, which dashboards and autoscalers know, behind a prefix of our own: a colon, as in
`vllm:num_requests_waiting`, is for recording rules only (prometheus.io/docs/practices/naming), and
two engines behind one Prometheus must not be taken for one another. All times are seconds.

The exposition itself, and prometheus_client with it, is imported by the first scrape: that takes
40 ms, which the first token would wait for.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

# Imported by the first scrape.
if TYPE_CHECKING:
    from coldframe.runtime.endpoint.frontstats import FrontStats

__all__ = ["Histogram", "Metrics", "ModelNumbers", "RequestTrace"]

# From what a warm replica does to what a cold one may take.
_LATENCY_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0),
)
_BETWEEN_TOKENS_S = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0),
)
FINISHED = ("stop", "length")
UNFINISHED = ("gone", "error")
REFUSED = ("bad_request", "unauthorized", "not_found", "queue_full", "deadline", "saturated")
_WAITING, _RUNNING, _ENDED = range(3)


class Histogram:
    """How often a value fell between which bounds.

    Args:
        bounds: Upper bounds, ascending; a value that equals one lies below it.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """By bucket, not cumulative; the last has no bound."""
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class ModelNumbers:
    """The numbers of one model."""

    __slots__ = (
        "between_tokens",
        "end_to_end",
        "failed",
        "first_token",
        "generated",
        "prompt",
        "queued",
        "running",
        "succeeded",
        "waiting",
    )

    def __init__(self) -> None:
        self.first_token = Histogram(_LATENCY_S)
        self.between_tokens = Histogram(_BETWEEN_TOKENS_S)
        self.end_to_end = Histogram(_LATENCY_S)
        self.queued = Histogram(_LATENCY_S)
        self.waiting = 0
        self.running = 0
        self.prompt = 0
        self.generated = 0
        # What can happen is there from the start: a rate needs a zero to begin at.
        self.succeeded = Counter(dict.fromkeys(FINISHED, 0))
        self.failed = Counter(dict.fromkeys(UNFINISHED, 0))


class Metrics:
    """All that the gateway counts.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.models: dict[str, ModelNumbers] = {}
        self.refusals: Counter[tuple[str, str]] = Counter()
        """By model and reason."""
        self.responses: Counter[tuple[str, str, int]] = Counter()
        """By method, route and status."""

    def begin(self, model: str, arrived: float | None = None) -> RequestTrace:
        """A request for tokens has come in and waits; it may be for several sequences.

        Args:
            model: A model card's name. Never what a client sent: each name is a series for ever.
            arrived: When it was there, on the clock; now by default.
        """
        moment = self.clock() if arrived is None else arrived
        return RequestTrace(self.clock, self.model(model), self.refusals, model, moment)

    def model(self, name: str) -> ModelNumbers:
        """The numbers of a model; they begin at zero with the first call."""
        found = self.models.get(name)
        if found is None:
            found = self.models[name] = ModelNumbers()
            self.refusals.update({(name, reason): 0 for reason in REFUSED})
        return found

    def refused(self, reason: str, model: str = "") -> None:
        """A request was refused before it came so far as to `begin`.

        Args:
            reason: A word, one of few: `bad_request`, `queue_full`, `deadline`, `saturated`, ...
            model: As in `begin`; empty where none is known.
        """
        self.refusals[model, reason] += 1

    def answered(self, method: str, route: str, status: int) -> None:
        """An HTTP answer was begun.

        Args:
            method: GET, POST, ...; what is no method that we serve should come as `other`.
            route: The route's template, such as `/v2/models/{model}/infer`; never a path as a
                client wrote it. Empty where there is none.
            status: Of the answer.
        """
        self.responses[method, route, status] += 1

    def render(self, stats: Mapping[str, FrontStats], accept: str = "") -> tuple[bytes, str]:
        """The exposition; from the loop or, since the first one imports much, from a thread.

        Args:
            stats: What the front said of each model, by name. Where it said nothing the series are
                missing, which is what Prometheus calls a gap.
            accept: The request's Accept header.

        Returns:
            The text and its content type: OpenMetrics where that is accepted, else Prometheus's.
        """
        from coldframe.runtime.gateway.exposition import render

        return render(self, stats, accept)


class RequestTrace:
    """One request on its way: `begin`, `submitted`, `token` by token, `end`.

    A call takes half a microsecond. What comes after the end is ignored, so that whoever cleans up
    need not know what has happened.
    """

    __slots__ = ("_arrived", "_clock", "_last", "_name", "_numbers", "_refusals", "_state")

    def __init__(
        self,
        clock: Callable[[], float],
        numbers: ModelNumbers,
        refusals: Counter[tuple[str, str]],
        name: str,
        arrived: float,
    ) -> None:
        self._clock = clock
        self._numbers = numbers
        self._refusals = refusals
        self._name = name
        self._arrived = arrived
        self._last: dict[int, float] = {}
        """When the last token of each sequence came."""
        self._state = _WAITING
        numbers.waiting += 1

    def submitted(self) -> None:
        """Its first sequence was given to a worker; said of others, it means nothing."""
        if self._state == _WAITING:
            self._state = _RUNNING
            self._numbers.waiting -= 1
            self._numbers.running += 1
            self._numbers.queued.observe(self._clock() - self._arrived)

    def token(self, prompt_tokens: int = 0, choice: int = 0) -> None:
        """A token has come.

        Args:
            prompt_tokens: Of its sequence's prompt; they count with a sequence's first token.
            choice: The sequence's index.
        """
        if self._state == _ENDED:
            return
        now, numbers = self._clock(), self._numbers
        last = self._last.get(choice)
        if last is not None:
            numbers.between_tokens.observe(now - last)
        else:
            if not self._last:
                self.submitted()
                numbers.first_token.observe(now - self._arrived)
            numbers.prompt += prompt_tokens
        numbers.generated += 1
        self._last[choice] = now

    def end(self, reason: str) -> None:
        """It was answered to the end.

        Args:
            reason: `stop` or `length`, of the sequence that was last.
        """
        if self._leave():
            self._numbers.succeeded[reason] += 1
            self._numbers.end_to_end.observe(self._clock() - self._arrived)

    def gone(self) -> None:
        """Nobody waits for the answer any more."""
        if self._leave():
            self._numbers.failed["gone"] += 1

    def refused(self, reason: str) -> None:
        """It gets an error for an answer; where there was a token already, it counts as failed.

        Args:
            reason: As in `Metrics.refused`.
        """
        if self._leave():
            if self._last:
                self._numbers.failed["error"] += 1
            else:
                self._refusals[self._name, reason] += 1

    def _leave(self) -> bool:
        if self._state == _WAITING:
            self._numbers.waiting -= 1
        elif self._state == _RUNNING:
            self._numbers.running -= 1
        else:
            return False
        self._state = _ENDED
        return True
