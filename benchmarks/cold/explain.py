"""A start's timeline as figures: each stage's busy time, what of it overlapped, and the path.

A stage is busy while one of its spans is, those that wait excepted. Its *overlap* is the part of
that in which some other stage was busy, too; the part beside the weights is named apart, since
hiding behind them is what all other stages should do. The *path* divides the time to the first
token among what it was waiting for; its parts add up to that time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

__all__ = [
    "UNATTRIBUTED",
    "WEIGHTS",
    "Busy",
    "Key",
    "asked_from",
    "busy_times",
    "load_s",
    "mapped",
    "path_of",
    "rest_timeline",
]

WEIGHTS = ("weight_read", "weight_fetch")
_CLIENT = ("client", "first_token")
UNATTRIBUTED = ("", "unattributed")
_ANSWERING = ("tokenize", "prefill")

Key = tuple[str, str]
"""A process and the name of a stage in it, without the number of a layer."""
_Spans = list[tuple[float, float]]


class Busy(NamedTuple):
    """Of one stage in one start, in seconds."""

    seconds: float
    overlap: float
    beside_weights: float


def busy_times(timeline: Mapping[str, Any]) -> dict[Key, Busy]:
    """The stages of a start, in the order in which they began.

    Args:
        timeline: As `Timeline.to_json` makes it.
    """
    spans: dict[Key, _Spans] = {}
    for stage in timeline["stages"]:
        # An instant takes no time, and who waits is not busy.
        if "waits_for" in stage or stage["end_s"] <= stage["start_s"]:
            continue
        if stage["name"].startswith("stage_ready["):
            continue
        spans.setdefault(_key(stage), []).append((stage["start_s"], stage["end_s"]))
    together = {key: _union(mine) for key, mine in spans.items()}
    weights = _union(s for key, mine in together.items() if key[1] in WEIGHTS for s in mine)
    found = {}
    for key, mine in together.items():
        others = _union(s for other, theirs in together.items() if other != key for s in theirs)
        beside = 0.0 if key[1] in WEIGHTS else _length(_common(mine, weights))
        found[key] = Busy(_length(mine), _length(_common(mine, others)), beside)
    return found


def path_of(timeline: Mapping[str, Any], ttft_s: float) -> dict[Key, float]:
    """What the first token was waiting for, in seconds, in the order in which it began.

    Args:
        timeline: As `Timeline.to_json` makes it.
        ttft_s: When the client had the token. A replica whose gateway is up last has made a token
            for nobody by then, with which its own path ends: the client waits for the gateway and
            its own prefill behind it. And a front that is kept from its core notes its own first
            token only when the client has it already: what it does behind that is left out.
    """
    found: dict[Key, float] = {}
    ended_s = 0.0
    for step in timeline["critical_path"]:
        end_s = min(step["end_s"], ttft_s)
        if end_s <= step["start_s"]:
            continue
        key = _key(step)
        found[key] = found.get(key, 0.0) + end_s - step["start_s"]
        ended_s = end_s
    for key, seconds in _behind(timeline, ended_s, ttft_s):
        found[key] = found.get(key, 0.0) + seconds
    return found


def rest_timeline(
    stages: Iterable[Mapping[str, Any]], sent_s: float, ttft_s: float, queue_s: float
) -> dict[str, Any] | None:
    """What became of a request to a replica that was there, as `Timeline.to_json` has a start.

    Args:
        stages: The latest of the replica's, in seconds from some moment on.
        sent_s: When the request was sent, likewise.
        ttft_s: How long its first token took, at the client.
        queue_s: How long it waited in the gateway.

    Returns:
        The stages and the path, in seconds from the request on; None where its prefill is not among
        them (yet).
    """
    shifted = [
        {**stage, "start_s": stage["start_s"] - sent_s, "end_s": stage["end_s"] - sent_s}
        for stage in stages
    ]
    # Whoever waited for the request had done so before.
    own = [
        {**stage, "start_s": max(0.0, stage["start_s"])}
        for stage in shifted
        if stage["end_s"] > 0 and (stage["start_s"] >= 0 or "waits_for" in stage)
    ]
    heads = [stage for stage in own if stage["name"] == "prefill[head]"]
    if not heads:
        return None
    path = _rest_path(own, heads[0], ttft_s, min(queue_s, ttft_s))
    waited = {"name": "queue", "process": "gateway", "start_s": 0.0, "end_s": queue_s}
    return {
        "ttft_s": ttft_s,
        "stages": sorted([waited, *own], key=lambda stage: (stage["start_s"], stage["end_s"])),
        "critical_path": path,
        "unattributed_s": sum(
            (step["end_s"] - step["start_s"] for step in path if step["name"] == UNATTRIBUTED[1]),
            0.0,
        ),
    }


def _rest_path(
    stages: Sequence[Mapping[str, Any]], head: Mapping[str, Any], ttft_s: float, queue_s: float
) -> list[dict[str, Any]]:
    """Each moment until the first token: the gateway's, the worker's, or on the way between."""
    busy = [stage for stage in stages if "waits_for" not in stage]
    worker = [stage for stage in busy if stage["process"] == head["process"]]
    # Of a GPU the weights may have to come back first.
    others = [stage for stage in busy if stage["process"].startswith("memory")]
    made_s = min(head["end_s"], ttft_s)
    edges = {moment for s in (*worker, *others) for moment in (s["start_s"], s["end_s"])}
    edges |= {0.0, queue_s, made_s, ttft_s}
    cuts = sorted(edge for edge in edges if 0.0 <= edge <= ttft_s)
    path: list[dict[str, Any]] = []
    for left, right in pairwise(cuts):
        here = [s for s in worker if s["start_s"] <= left and s["end_s"] >= right]
        here = here or [s for s in others if s["start_s"] <= left and s["end_s"] >= right]
        name, process = "first_token", "client"
        if left < made_s and here:
            owner = max(here, key=lambda stage: float(stage["start_s"]))
            name, process = owner["name"], owner["process"]
        elif left < min(queue_s, made_s):
            name, process = "queue", "gateway"
        elif left < made_s:
            process, name = UNATTRIBUTED
        step = {"name": name, "process": process, "start_s": left, "end_s": right}
        if path and (path[-1]["name"], path[-1]["process"]) == (name, process):
            path[-1]["end_s"] = right
        else:
            path.append(step)
    return path


def _behind(timeline: Mapping[str, Any], from_s: float, to_s: float) -> Iterable[tuple[Key, float]]:
    """What a client was waiting for between the replica's first token and its own."""
    if to_s - from_s <= 1e-9:
        return
    busy = [stage for stage in timeline["stages"] if "waits_for" not in stage]
    gateway = [stage for stage in busy if stage["process"] == "gateway"]
    working = [stage for stage in busy if _key(stage)[1] in _ANSWERING]
    accepts_s = max((stage["end_s"] for stage in gateway), default=0.0)
    edges = {moment for s in (*gateway, *working) for moment in (s["start_s"], s["end_s"])}
    cuts = sorted({from_s, to_s, *(edge for edge in edges if from_s < edge < to_s)})
    for left, right in pairwise(cuts):
        owners = gateway if right <= accepts_s else working
        here = [s for s in owners if s["start_s"] <= left and s["end_s"] >= right]
        if here:
            yield _key(max(here, key=lambda stage: float(stage["start_s"]))), right - left
        else:
            yield UNATTRIBUTED if right <= accepts_s else _CLIENT, right - left


def asked_from(timeline: Mapping[str, Any], sent_s: float) -> float:
    """From when on a prefill may be a client's, in seconds from the exec on.

    Args:
        timeline: As `Timeline.to_json` makes it.
        sent_s: When the client has sent its request. It may have waited in the port's queue: what
            was computed before the gateway took connections was for nobody.
    """
    stages = timeline["stages"]
    names = (("gateway", "listen"), ("gateway", "imports"))
    taking = (float(stage["end_s"]) for stage in stages if _key(stage) in names)
    return max(sent_s, *taking, 0.0)


def load_s(timeline: Mapping[str, Any]) -> float | None:
    """From the first byte that is asked for until the last is in; None where that is unknown."""
    began = [s["start_s"] for s in timeline["stages"] if s["name"] in WEIGHTS]
    ready = [s["end_s"] for s in timeline["stages"] if s["name"].startswith("stage_ready[")]
    if not began or not ready or max(ready) <= min(began):
        return None
    return float(max(ready) - min(began))


def mapped(timeline: Mapping[str, Any]) -> bool:
    """Whether the weights were not moved at all, but mapped where the page cache has them."""
    notes = [s.get("note", "") for s in timeline["stages"] if s["name"] == "weight_read"]
    return bool(notes) and all(note.startswith("mapped") for note in notes)


def _key(stage: Mapping[str, Any]) -> Key:
    return stage["process"], stage["name"].partition("[")[0]


def _union(spans: Iterable[tuple[float, float]]) -> _Spans:
    """The same time as spans in order, apart from one another."""
    made: _Spans = []
    for start, end in sorted(spans):
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], end))
        else:
            made.append((start, end))
    return made


def _common(ones: Sequence[tuple[float, float]], others: _Spans) -> _Spans:
    found: _Spans = []
    at = 0
    for start, end in ones:
        while at < len(others) and others[at][1] <= start:
            at += 1
        for left, right in others[at:]:
            if left >= end:
                break
            found.append((max(start, left), min(end, right)))
    return found


def _length(spans: _Spans) -> float:
    return sum(end - start for start, end in spans)
