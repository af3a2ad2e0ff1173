"""How long the stages of a model's life take: what a simulation is made of.

`Times` is what is known of a model on a machine: measured runs, as they came. `Draw` hands them
out one after the other: every run as often as each other, in an order drawn by a seed, so that
what many starts take together is their mean and a single one is as slow as some really was.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coldframe.loader.errors import RequestError

__all__ = ["Draw", "Line", "StartTier", "Times"]

_RUNS = ("fresh", "restored", "parked", "end", "behind")
StartTier = Literal["fresh", "restored"]


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds that grow with a number.

    Args:
        base_s: For none.
        each_s: More for each.
    """

    base_s: float
    each_s: float

    def __call__(self, count: float) -> float:
        return self.base_s + self.each_s * count

    def to_json(self) -> dict[str, float]:
        return {"base_s": self.base_s, "each_s": self.each_s}


@dataclass(frozen=True, slots=True)
class Times:
    """What is known of the stages of one model on one machine.

    Args:
        fresh: From the request that finds it at zero until prompts can be computed, processes
            started fresh, in seconds: runs; none where that is not known.
        restored: Likewise, from an image.
        parked: Likewise, from parked.
        end: From the decision to end a replica until it is at zero.
        prefill: From a prompt's turn to its first token at the client, by its tokens.
        decode: A step of decode, by the sequences in it.
        how: Where these are from.
        behind: For how long after the first token of a start from zero there is no second one,
            since who decodes is not up: runs.
        beside: By which part of it a start takes longer for each other one at the same time: they
            share cores, and the path that the weights come by.
    """

    fresh: Sequence[float]
    restored: Sequence[float]
    parked: Sequence[float]
    end: Sequence[float]
    prefill: Line
    decode: Line
    how: str
    behind: Sequence[float] = ()
    beside: float = 0.0

    def __post_init__(self) -> None:
        numbers = [self.beside, *(run for name in _RUNS for run in getattr(self, name))]
        for line in (self.prefill, self.decode):
            numbers += [line.base_s, line.each_s]
        wrong = [number for number in numbers if not 0 <= number < float("inf")]
        if wrong:
            raise RequestError("a stage cannot take so long", where=self.how, got=f"{wrong[0]} s")

    def and_also(self, other: Times) -> Times:
        """These and others of the same: all runs, and lines between the two."""
        runs = {name: [*getattr(self, name), *getattr(other, name)] for name in _RUNS}
        lines = [
            Line((a.base_s + b.base_s) / 2, (a.each_s + b.each_s) / 2)
            for a, b in ((self.prefill, other.prefill), (self.decode, other.decode))
        ]
        return Times(
            fresh=runs["fresh"],
            restored=runs["restored"],
            parked=runs["parked"],
            end=runs["end"],
            prefill=lines[0],
            decode=lines[1],
            how=f"{self.how}, {other.how}",
            behind=runs["behind"],
            beside=(self.beside + other.beside) / 2,
        )

    def start(self, tier: StartTier) -> Sequence[float]:
        """Runs of a start from zero.

        Raises:
            RequestError: It is not known how long that takes.
        """
        found = self.fresh if tier == "fresh" else self.restored
        if not found:
            raise RequestError("it is not known how long such a start takes", where=tier)
        return found

    def to_json(self) -> dict[str, Any]:
        runs = {name: list(getattr(self, name)) for name in _RUNS}
        lines = {"prefill": self.prefill.to_json(), "decode": self.decode.to_json()}
        return {"how": self.how, **runs, **lines, "beside": self.beside}

    @staticmethod
    def from_json(found: Mapping[str, Any], where: str) -> Times:
        """Raises RequestError: These are no times."""
        try:
            runs = {name: [float(run) for run in found[name]] for name in _RUNS}
            lines = {
                name: Line(float(found[name]["base_s"]), float(found[name]["each_s"]))
                for name in ("prefill", "decode")
            }
            return Times(
                fresh=runs["fresh"],
                restored=runs["restored"],
                parked=runs["parked"],
                end=runs["end"],
                prefill=lines["prefill"],
                decode=lines["decode"],
                how=f"{where}: {found['how']}",
                behind=runs["behind"],
                beside=float(found["beside"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                "these are no times of a model's stages",
                where=where,
                got=f"{type(error).__name__}: {error}",
            ) from error


class Draw:
    """Hands out runs, each as often as each other.

    Args:
        runs: At least one, but for 0 s.
        seed: Of their order.
    """

    def __init__(self, runs: Sequence[float], seed: int = 0) -> None:
        self._runs = list(runs) or [0.0]
        self._left: list[float] = []
        self._chance = random.Random(seed)

    def __call__(self) -> float:
        if not self._left:
            self._left = self._chance.sample(self._runs, len(self._runs))
        return self._left.pop()
