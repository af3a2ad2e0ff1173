"""Loads: who asks when, for how much. The same seed makes the same load.

Arrivals do not wait for answers. The gaps between them are drawn from a gamma distribution whose
mean is one over the rate: with a burstiness of 1 that is a Poisson process, below that they come in
bursts, above it evenly (the shape of the distribution, as vLLM's `bench serve` has it). Or they are
a trace's.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from coldframe.benchmarks.traffic.traces import Arrival, scaled, token_scale
from coldframe.loader.errors import RequestError

__all__ = ["Ask", "Lengths", "Traffic", "arrival_times"]

_FIRST_ID = 5
"""Ids below it are a tokenizer's own."""
_LENGTHS = re.compile(r"([0-9]{1,7})(?:-([0-9]{1,7}))?")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a load.

    Args:
        due_s: When it is to be sent, since the load's start.
        prompt: Token ids, which nobody else's prompt begins with.
        tokens: How many it asks for.
    """

    due_s: float
    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many tokens: between two bounds, each number as likely as the others."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Reads `256` or `64-512`.

        Raises:
            argparse.ArgumentTypeError: It is no such text.
        """
        match = _LENGTHS.fullmatch(text.strip())
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no length; write 256 or 64-512")
        return cls(least, most)

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.least, self.most)


def arrival_times(
    rate: float, burstiness: float, seconds: float, chance: random.Random
) -> list[float]:
    """When requests arrive within some seconds, at least one of them.

    Args:
        rate: Requests a second in the mean.
        burstiness: Shape of the gamma distribution of the gaps; 1 for a Poisson process.
        seconds: How long it goes on.
        chance: Draws.
    """
    found: list[float] = []
    at = 0.0
    while True:
        at += chance.gammavariate(burstiness, 1 / (rate * burstiness))
        if found and at >= seconds:
            return found
        found.append(at)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What loads are made of.

    Args:
        seconds: How long arrivals go on.
        prompt: Lengths of prompts.
        answer: Lengths of answers.
        context: The model's, in tokens: prompt and answer fit into it.
        vocabulary: Ids that the model has.
        burstiness: See `arrival_times`.
        trace: Arrivals to follow instead, with their lengths; those beyond `seconds` are left out.
    """

    seconds: float
    prompt: Lengths
    answer: Lengths
    context: int
    vocabulary: int
    burstiness: float = 1.0
    trace: Sequence[Arrival] | None = None

    def __post_init__(self) -> None:
        longest = self.prompt.most + self.answer.most
        if self.trace is None and longest > self.context:
            raise RequestError(
                "requests do not fit the model's context",
                where="--prompt-tokens and --answer-tokens",
                expected=f"at most {self.context} together",
                got=longest,
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        if self.trace is None:
            return self.prompt.most + self.answer.most
        return max(arrival.context + arrival.generated for arrival in self._scaled())

    @property
    def scale(self) -> float:
        """A trace's tokens are multiplied by this, so that the longest of its requests fits."""
        if self.trace is None:
            return 1.0
        return token_scale(self._window(), self.context)

    def load(self, rate: float | None, seed: int) -> list[Ask]:
        """A load.

        Args:
            rate: Requests a second in the mean. A trace is stretched or compressed for it; None
                follows it as it is.
            seed: Of what is drawn.
        """
        chance = random.Random(seed)
        if self.trace is not None:
            window = self._scaled()
            pace = 1.0
            if rate is not None:
                pace = len(window) / rate / self.seconds
            sizes = [(pace * a.at_s, a.context, a.generated) for a in window]
        else:
            if rate is None:
                raise RequestError("arrivals need a rate or a trace", where="--rate")
            sizes = [
                (at, self.prompt.draw(chance), self.answer.draw(chance))
                for at in arrival_times(rate, self.burstiness, self.seconds, chance)
            ]
        ids = range(_FIRST_ID, self.vocabulary)
        return [
            Ask(at, tuple(chance.choices(ids, k=prompt)), answer) for at, prompt, answer in sizes
        ]

    def _window(self) -> list[Arrival]:
        assert self.trace is not None
        return [arrival for arrival in self.trace if arrival.at_s < self.seconds]

    def _scaled(self) -> list[Arrival]:
        return scaled(self._window(), self.scale)
