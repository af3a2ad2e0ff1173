"""Which state each model of a live server was in, from what the server has logged.

A front says when a model changes its state (`state`), or at least when it is ready and how long
that took from the request, when it is parked and when it is at zero. That it was woken from parked
it may not say: that is when the next request was sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from coldframe.benchmarks.traffic.played import From, Stay

__all__ = ["Change", "changes", "met", "says_all", "stays"]


@dataclass(frozen=True, slots=True)
class Change:
    """A model is in a state from then on.

    Args:
        at_s: Since when, in seconds of CLOCK_MONOTONIC.
        model: Which.
        state: What it is.
        took_s: How long it had been starting.
    """

    at_s: float
    model: str
    state: str
    took_s: float = 0.0


def changes(words: str, names: Sequence[str], wall_s: float) -> list[Change]:
    """What a log says of the models' states, in its order.

    Args:
        words: The log, in JSON; other lines in it are none of it.
        names: The models. With one alone lines do not name it.
        wall_s: What the wall clock is ahead of CLOCK_MONOTONIC.
    """
    found, all_told = [], says_all(words)
    for line in _lines(words):
        event, model = line["event"], line.get("model", names[0])
        at_s = datetime.fromisoformat(line["time"]).timestamp() - wall_s
        if event == "state":
            found.append(Change(line["at_s"], model, line["to"]))
        elif event in ("parked", "zero") and not all_told:
            found.append(Change(at_s, model, event))
        elif event == "ready" and not all_told:
            found.append(Change(at_s, model, "warm", line["first_token_s"]))
    return found


def says_all(words: str) -> bool:
    """Whether a log has every change of a state."""
    return any(line["event"] == "state" for line in _lines(words))


def stays(
    found: Iterable[Change], sent: Sequence[float], origin_s: float, seconds: float
) -> list[Stay]:
    """What one model was while a trace was replayed.

    Args:
        found: Its changes; before the first one it was at zero.
        sent: When it was asked, seconds since the origin, in their order; none where the log says
            all.
        origin_s: When the replay began, in seconds of CLOCK_MONOTONIC.
        seconds: How long it was.
    """
    moments = list(_moments([(c.at_s - origin_s, c) for c in found], sent))
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


def _moments(
    found: Sequence[tuple[float, Change]], sent: Sequence[float]
) -> Iterator[tuple[float, str]]:
    """When it came into which state, with what a log may leave out."""
    for number, (at_s, change) in enumerate(found):
        if change.took_s:
            yield (
                max(at_s - change.took_s, found[number - 1][0] if number else -math.inf),
                "starting",
            )
        yield at_s, change.state
        until_s = found[number + 1][0] if number + 1 < len(found) else math.inf
        if change.state == "parked":
            woken = next((moment for moment in sent if at_s <= moment < until_s), None)
            if woken is not None:
                yield woken, "warm"


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
