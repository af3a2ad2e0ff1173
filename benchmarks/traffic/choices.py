"""Ways to scale, what would become of a trace with each, and which one to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coldframe.benchmarks.traffic.played import Played
from coldframe.benchmarks.traffic.policies import Chosen
from coldframe.benchmarks.traffic.stages import StartTier
from coldframe.runtime.units import human_seconds

__all__ = ["Choice", "Judged", "decide"]

_NEAR = 0.05
"""Who costs more by that share at most is as good as the cheapest."""
_SAME = 0.01
"""Times that differ by that share at most are the same."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to scale.

    Args:
        name: As people call it.
        chosen: The policy.
        tier: How models start from zero.
        begin: See `Setup`.
        pool: How many are kept parked.
    """

    name: str
    chosen: Chosen
    tier: StartTier
    begin: Literal["first", "zero", "warm"] = "zero"
    pool: int = 0


@dataclass(frozen=True, slots=True)
class Judged:
    """A choice, and what would become of the trace.

    Args:
        choice: Which.
        played: What became of the trace.
        cost: What it costs.
        slo_s: The percentile that counts, in seconds.
        meets: Whether that is in time.
    """

    choice: Choice
    played: Played
    cost: float
    slo_s: float
    meets: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.choice.name,
            "policy": self.choice.chosen.text,
            "tier": self.choice.tier,
            "pool": self.choice.pool,
            "cost": self.cost,
            "cold_starts": self.played.cold_starts,
            "cold_share": self.played.cold_starts / len(self.played.asked),
            "p50_s": self.played.ttft(50),
            "p99_s": self.played.ttft(99),
            "slo_percentile_s": self.slo_s,
            "gpu_s": self.played.gpu_s,
            "parked_s": self.played.parked_s,
            "meets_slo": self.meets,
        }


def decide(judged: Sequence[Judged], slo_s: float, percent: float) -> tuple[Judged, str, list[str]]:
    """Which one to take, why, and which are as good."""
    limit = f"{percent:g} % of first tokens within {human_seconds(slo_s)}"
    good = [one for one in judged if one.meets]
    if not good:
        least_s = min(one.slo_s for one in judged)
        nearest = [one for one in judged if one.slo_s <= least_s * (1 + _SAME)]
        best = min(nearest, key=lambda one: (one.cost, one.slo_s))
        why = (
            f"None has {limit}. {best.choice.name} comes nearest, with "
            f"{human_seconds(best.slo_s)}, for {best.cost:.4g}."
        )
        if any(one.choice.begin == "warm" for one in nearest):
            why += " Models that are always there are no sooner: what is late is no start."
        return best, why, [one.choice.name for one in nearest if one is not best]
    best = min(good, key=lambda one: (one.cost, one.slo_s))
    near = [one for one in good if one is not best and one.cost <= best.cost * (1 + _NEAR) + 1e-12]
    why = f"{best.choice.name} is the cheapest that has {limit}: {best.cost:.4g}, "
    why += f"{best.played.cold_starts} of {len(best.played.asked)} requests wait for a start."
    dearest = max(judged, key=lambda one: one.cost)
    if dearest.cost > best.cost > 0:
        why += f" {dearest.choice.name} costs {dearest.cost / best.cost:.2g} times that."
    cheaper = [one for one in judged if not one.meets and one.cost < best.cost]
    if cheaper:
        cheapest = min(cheaper, key=lambda one: one.cost)
        why += (
            f" {cheapest.choice.name} would cost {cheapest.cost:.4g}, and needs "
            f"{human_seconds(cheapest.slo_s)}."
        )
    for one in sorted(near, key=lambda one: one.cost):
        more = 0.0 if best.cost == 0 else one.cost / best.cost - 1
        why += (
            f" As good as that: {one.choice.name}, {more:.1%} more for {human_seconds(one.slo_s)}"
            f" instead of {human_seconds(best.slo_s)}."
        )
    return best, why, [one.choice.name for one in near]
