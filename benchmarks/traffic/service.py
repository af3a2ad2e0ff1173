"""What a simulated replica does with its requests: prompts one by one, answers as a batch.

As many as may run at once are with the workers. Prefill computes one prompt after the other, and
decode, which is another process, makes a token of every answer in each step; how long a step takes
depends on how many there are. Tokens are not simulated one by one: all answers of a batch get on
alike, so that it is known when the next one ends until somebody joins or leaves.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from coldframe.benchmarks.traffic.played import From
from coldframe.benchmarks.traffic.stages import Times
from coldframe.benchmarks.traffic.traces import Arrival

__all__ = ["Ask", "Clock", "Service"]


class Clock(Protocol):
    """The simulation's time."""

    now: float

    def at(self, moment_s: float, call: Callable[[], None]) -> None:
        """Has something called then."""
        ...


@dataclass(slots=True)
class Ask:
    """A request.

    Args:
        number: Its place in the trace.
        arrival: When it came, for how much.
        met: What its model was.
    """

    number: int
    arrival: Arrival
    met: From
    ttft_s: float | None = None


class Service:
    """The requests of one model.

    Args:
        clock: The simulation's.
        times: How long prefill and decode take.
        most: How many are with the workers at once.
        first_token: Called with each request that has its first token.
        answered: Called after each whole answer.
    """

    def __init__(
        self,
        clock: Clock,
        times: Times,
        most: int,
        first_token: Callable[[Ask], None],
        answered: Callable[[], None],
    ) -> None:
        self.inside = 0
        """How many are with the workers."""
        self.up = False
        """Whether these compute."""
        self.decode_from_s = 0.0
        """From when on there is somebody who decodes."""
        self._clock = clock
        self._times = times
        self._most = most
        self._first_token = first_token
        self._answered = answered
        self._held: deque[Ask] = deque()
        self._prompts: deque[Ask] = deque()
        self._prefilling = False
        self._ends: list[float] = []
        """After how many steps of decode which answer ends: a heap."""
        self._steps = 0.0
        self._stepped_at = 0.0
        self._batch = 0
        """Which batch it is: whoever waits for the end of another waits in vain."""

    @property
    def open(self) -> int:
        """Requests without a whole answer."""
        return len(self._held) + self.inside

    def add(self, ask: Ask) -> None:
        self._held.append(ask)

    def begin(self) -> None:
        """The workers are up."""
        self.up = True
        self._prefill()

    def feed(self) -> None:
        """Gives the workers what they may have, which they begin with when they are `up`."""
        while self._held and self.inside < self._most:
            self.inside += 1
            self._prompts.append(self._held.popleft())
        self._prefill()

    def _prefill(self) -> None:
        if self.up and self._prompts and not self._prefilling:
            self._prefilling = True
            ask = self._prompts.popleft()
            end_s = self._clock.now + self._times.prefill(ask.arrival.context)
            self._clock.at(end_s, lambda: self._prefilled(ask))

    def _prefilled(self, ask: Ask) -> None:
        self._prefilling = False
        ask.ttft_s = self._clock.now - ask.arrival.at_s
        self._prefill()
        self._first_token(ask)
        if ask.arrival.generated <= 1:
            self._end()
        elif self.decode_from_s > self._clock.now:
            self._clock.at(self.decode_from_s, lambda: self._decode(ask.arrival.generated - 1))
        else:
            self._decode(ask.arrival.generated - 1)

    def _decode(self, tokens: int) -> None:
        self._catch_up()
        heapq.heappush(self._ends, self._steps + tokens)
        self._expect()

    def _catch_up(self) -> None:
        """Counts the steps that were made since it was done last."""
        step_s = self._times.decode(len(self._ends))
        if self._ends and step_s > 0:
            self._steps += (self._clock.now - self._stepped_at) / step_s
        self._stepped_at = self._clock.now

    def _expect(self) -> None:
        self._batch += 1
        if self._ends:
            left = max(0.0, self._ends[0] - self._steps)
            batch = self._batch
            end_s = self._clock.now + left * self._times.decode(len(self._ends))
            self._clock.at(end_s, lambda: self._decoded(batch))

    def _decoded(self, batch: int) -> None:
        if batch == self._batch:
            self._catch_up()
            # Exactly there, whatever the sums of fractions have come to.
            self._steps = heapq.heappop(self._ends)
            self._expect()
            self._end()

    def _end(self) -> None:
        self.inside -= 1
        self._answered()
