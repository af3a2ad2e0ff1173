"""When the next request comes: several guesses, each of them weighed by how well it has guessed.

Together they (`scaling.guesses`) are a Bayesian mixture whose weights may shift ("fixed share",
Herbster and Warmuth 1998), so that another guess can take over when a model's traffic changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldframe.runtime.scaling.guesses import (
    EDGES,
    Gaps,
    Guess,
    Rate,
    TimesOf,
    number,
    place_of,
)

__all__ = ["EDGES", "Arrivals"]

_SHARE = 0.02
"""How much of the weights is shared out anew with each idle time."""


class Arrivals:
    """All guesses, weighed."""

    def __init__(self) -> None:
        self._guesses: dict[str, Guess] = {
            "gaps": Gaps(),
            "minute": Rate(60.0),
            "quarter": Rate(900.0),
            "hours": Rate(4 * 3600.0),
            "of_hour": TimesOf(3600.0, 60),
            "of_day": TimesOf(86400.0, 48),
        }
        self.weights = {name: 1 / len(self._guesses) for name in self._guesses}
        """What each has earned; they add up to 1."""
        self.seen = 0
        """How many idle times have ended."""
        self._said: dict[str, list[float]] = {}
        """What each said when nobody was asking any more."""

    @property
    def best(self) -> str:
        """Who guesses best of late."""
        return max(self.weights, key=self.weights.__getitem__)

    def arrived(self, at_s: float, idle_s: float | None) -> None:
        """A request has come.

        Args:
            at_s: When, in seconds.
            idle_s: For how long nobody had asked; None where it was not the first after that.
        """
        if idle_s is not None:
            self._judge(idle_s)
        for guess in self._guesses.values():
            if idle_s is not None:
                guess.waited(idle_s)
            guess.arrived(at_s)

    def survival(self, at_s: float) -> list[float]:
        """The probabilities that nobody comes until each of EDGES from now on."""
        self._said = {name: guess.survival(at_s) for name, guess in self._guesses.items()}
        weights = [self.weights[name] for name in self._said]
        columns = zip(*self._said.values(), strict=True)
        return [
            sum(weight * value for weight, value in zip(weights, column, strict=True))
            for column in columns
        ]

    def _judge(self, idle_s: float) -> None:
        """Those that held for likely what has come gain, the others lose."""
        self.seen += 1
        if not self._said:
            return
        place = place_of(idle_s)
        found = {}
        for name, survival in self._said.items():
            after = survival[place + 1] if place + 1 < len(survival) else 0.0
            found[name] = self.weights[name] * max(survival[place] - after, 1e-9)
        total, share = sum(found.values()), _SHARE / len(found)
        self.weights = {name: (1 - _SHARE) * value / total + share for name, value in found.items()}
        self._said = {}

    def saved(self, at_s: float) -> dict[str, Any]:
        """What all know, as JSON values."""
        return {
            "seen": self.seen,
            "weights": dict(self.weights),
            "guesses": {name: guess.saved(at_s) for name, guess in self._guesses.items()},
        }

    @classmethod
    def load(cls, state: Mapping[str, Any], at_s: float) -> Arrivals:
        """Those that go on from there.

        Args:
            state: What `saved` gave.
            at_s: The time now, less what has passed since.

        Raises:
            ValueError, TypeError, KeyError: It is none.
        """
        found = cls()
        if set(state["weights"]) != set(found.weights):
            raise ValueError("these are other guesses")
        weights = {name: number(state["weights"][name]) for name in found.weights}
        total = sum(weights.values())
        if not 0.5 < total < 2:
            raise ValueError("these are no weights")
        found.weights = {name: weight / total for name, weight in weights.items()}
        found.seen = int(state["seen"])
        for name, guess in found._guesses.items():
            guess.load(state["guesses"][name], at_s)
        return found
