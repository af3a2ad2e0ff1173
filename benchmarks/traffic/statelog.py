"""Which state each model of a live server was in, from what the server has logged.

A front says when a model changes its state, by CLOCK_MONOTONIC: the lines `state` of its log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from coldframe.benchmarks.traffic.played import From, Stay
from coldframe.loader.errors import PlatformError

__all__ = ["Change", "changes", "met", "stays"]


@dataclass(frozen=True, slots=True)
class Change:
    """A model is in a state from then on.

    Args:
        at_s: Since when, in seconds of CLOCK_MONOTONIC.
        model: Which.
        state: What it is.
    """

    at_s: float
    model: str
    state: str


def changes(words: str, names: Sequence[str]) -> list[Change]:
    """What a log says of the models' states, in its order.

    Args:
        words: The log, in JSON; other lines in it are none of it.
        names: The models. With one alone lines do not name it.

    Raises:
        PlatformError: It says nothing of any state, which would be taken for zero all the time.
    """
    found = [
        Change(line["at_s"], line.get("model", names[0]), line["to"])
        for line in _lines(words)
        if line["event"] == "state"
    ]
    if not found:
        raise PlatformError(
            "a server's log says nothing of its models' states",
            expected="lines `state`, which are in a log of level info, in JSON",
            got=words[-300:].strip() or "nothing",
        )
    return found


def stays(found: Iterable[Change], origin_s: float, seconds: float) -> list[Stay]:
    """What one model was while a trace was replayed.

    Args:
        found: Its changes; before the first one it was at zero.
        origin_s: When the replay began, in seconds of CLOCK_MONOTONIC.
        seconds: How long it was.
    """
    moments = [(change.at_s - origin_s, change.state) for change in found]
    before = [state for at_s, state in moments if at_s <= 0]
    inside = [(at_s, state) for at_s, state in moments if 0 < at_s < seconds]
    points = [(0.0, before[-1] if before else "zero"), *inside, (seconds, "")]
    merged: list[Stay] = []
    for (start_s, state), (end_s, _) in pairwise(points):
        if merged and merged[-1].state == state:
            merged[-1] = Stay(state, merged[-1].start_s, end_s)
        elif end_s > start_s:
            merged.append(Stay(state, start_s, end_s))
    return merged


def met(at_s: float, found: Sequence[Stay]) -> From:
    """What a request met: where its model was about to be at zero it had to be started, too.

    Args:
        at_s: When it was sent, in seconds since the origin.
        found: What its model was.
    """
    number = max((n for n, stay in enumerate(found) if stay.start_s <= at_s), default=0)
    state = found[number].state
    after = found[number + 1].state if number + 1 < len(found) else None
    if state == "draining":
        return "parked" if after == "parked" else "zero"
    if state == "parked":
        return "zero" if after == "zero" else "parked"
    return "warm" if state == "warm" else "zero"


def _lines(words: str) -> Iterator[dict[str, Any]]:
    """What the front has said."""
    for line in words.splitlines():
        if line.startswith("{"):
            with suppress(ValueError):  # whatever else is written beside the log
                found = json.loads(line)
                if found.get("process") == "front" and "event" in found:
                    yield found
