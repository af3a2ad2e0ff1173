"""What it is worth to hold a model while nobody asks it.

Models are held for one another's memory, so that all are measured by the same: seconds of waiting
that holding one is expected to save its clients, for each second for which it is held. For how long
it would be held is free: until somebody asks, or until it is given up, whenever the two are best
for each other. That is the index of Gittins (1979) for work of which only the distribution of what
is left is known. It makes one that is asked every five seconds worth more than one that is certain
to be asked within the hour, and one that was to be asked long ago worth less and less.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["saved_per_second"]

_TIMES_S = tuple(0.25 * 2.0**i for i in range(22))
"""For how long it may be held: up to six days."""


def saved_per_second(chance: Callable[[float], float], start_s: float, *, there: bool) -> float:
    """Seconds of waiting that are saved for each second for which a model is held.

    Args:
        chance: How likely somebody asks within so many seconds from now on.
        start_s: How long its start takes, in seconds.
        there: Whether it is there; else it is started now, and who comes before it is up still
            waits for the rest.
    """
    best = saved_s = held_s = came = before_s = 0.0
    for at_s in _TIMES_S:
        comes = max(came, chance(at_s))
        middle_s = (before_s + at_s) / 2
        saved_s += (comes - came) * (start_s if there else min(middle_s, start_s))
        held_s += (1 - (came + comes) / 2) * (at_s - before_s)
        if held_s > 0:
            best = max(best, saved_s / held_s)
        came, before_s = comes, at_s
    return best
