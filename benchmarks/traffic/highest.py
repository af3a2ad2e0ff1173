"""The highest rate that is served well: doubled until it is not, then narrowed down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

__all__ = ["Probe", "highest_rate"]

_DOUBLINGS = 6
_HALVINGS = 4


@dataclass(frozen=True, slots=True)
class Probe:
    """A rate that was tried, and the share of its requests that were good."""

    rate: float
    share: float


def highest_rate(
    share_at: Callable[[float], float], start: float, least: float, within: float
) -> tuple[float | None, list[Probe]]:
    """Searches the highest rate at which a share of the requests is good.

    Args:
        share_at: Offers a load of so many requests a second; returns the share that was good.
        start: The rate to begin with.
        least: The share that is enough.
        within: How near to the true rate is near enough: 0.1 for a tenth.

    Returns:
        The highest rate seen to be enough, of those below the lowest seen not to be; None where
        a sixteenth of the first one was still too high. And all that was tried, in its order.
    """
    probes: list[Probe] = []

    def enough(rate: float) -> bool:
        probes.append(Probe(rate, share_at(rate)))
        return probes[-1].share >= least

    rate, step = start, 2.0 if enough(start) else 0.5
    for _ in range(_DOUBLINGS if step > 1 else _HALVINGS):
        other = rate * step
        if enough(other) != (step > 1):
            break
        rate = other
    else:
        return (rate, probes) if step > 1 else (None, probes)
    low, high = (rate, other) if step > 1 else (other, rate)
    while high / low > 1 + within:
        middle = sqrt(low * high)
        if enough(middle):
            low = middle
        else:
            high = middle
    return low, probes
