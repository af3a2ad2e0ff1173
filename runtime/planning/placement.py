"""Where a model fits, and where it would start fastest: devices here, and nodes elsewhere.

The times of another machine are those of this one's rehearsals, with what is there in place of what
is here: its state, its weights, its image, its rate. Where an endpoint has told what its own last
start took, that counts for a start of the same tier from the same state of the page cache. Where
weights are not there, and nobody says how fast they come, there is no time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coldframe.loader.checkpoints.plan import Plan
from coldframe.runtime.planning.law import Path
from coldframe.runtime.planning.nodes import NodeFacts
from coldframe.runtime.planning.rates import Rates
from coldframe.runtime.planning.starts import starts
from coldframe.runtime.units import human_bytes, human_seconds

__all__ = ["Here", "of_device", "of_node", "ranked"]

_WEIGHTS = {
    "memory": "weights in memory there",
    "page_cache": "weights in the page cache",
    "disk": "weights on its disk",
    "elsewhere": "weights are not there",
}
_THERE = {"ready": "warm", "draining": "warm", "parked": "parked"}
_THROUGH = "http"
"""Whoever chooses among places asks over a network."""


@dataclass(frozen=True, slots=True)
class Here:
    """What is known of this machine, to tell times of others by.

    Args:
        plan: The model's.
        rates: Of starts.
        disk: Bytes a second of this machine's disk, or of the source where that is elsewhere.
        needed: Bytes of memory that a replica takes.
    """

    plan: Plan
    rates: Rates
    disk: float
    needed: int


def of_device(document: Mapping[str, Any]) -> dict[str, Any]:
    """A place on this machine, from the plan for that device."""
    memory = document["memory"]
    cached = document["rate_bytes_per_s"] is None
    best = _best(
        document["starts"], "warm" if cached else "cold", ("restored", "template", "fresh")
    )
    why = [_WEIGHTS["page_cache"] if cached else f"weights come at {_rate(document)}"]
    ttft_s = document["predicted_ttft_s"] if best is None else best["ttft_s"]
    if best is not None and best["tier"] != "fresh":
        why.append("a snapshot is there" if best["tier"] == "restored" else "a template is there")
    place = _place(
        *(document["device"], "device", memory["total"], memory["available"], ttft_s, best, why)
    )
    return {**place, "weights": "page_cache" if cached else None}


def of_node(facts: NodeFacts, here: Here) -> dict[str, Any]:
    """A place elsewhere."""
    if facts.error is not None:
        return {
            **_place(facts.name, facts.kind, here.needed, None, None, None, [facts.error]),
            "reachable": False,
            "fits": None,
            "url": facts.url,
        }
    tier = _THERE.get(facts.state)
    why = [_WEIGHTS[facts.weights]]
    rate = facts.rate if facts.rate is not None else here.disk
    mapped = facts.weights in ("memory", "page_cache") and facts.kind != "peer"
    paths: dict[str, Path | str] = {"cold": Path(rate), "warm": Path(math.inf)}
    found = starts(here.rates, here.plan, paths)
    if facts.state in ("failed", "starting"):
        why.append(f"its replica is {facts.state}")
    if tier is not None:
        best = _best(found, "warm", (tier,))
        why = [f"a replica is {facts.state} there"]
    else:
        tiers = ("restored", "fresh") if facts.image else ("fresh",)
        best = _best(found, "warm" if mapped else "cold", tiers)
        if facts.image:
            why.append("a snapshot is there")
        if not mapped and facts.rate is not None:
            why.append(f"they come at {human_bytes(facts.rate)}/s")
    ttft_s = None if best is None else best["ttft_s"]
    if tier is None and facts.weights == "elsewhere" and facts.rate is None:
        ttft_s = None
        why.append("how fast they would come is not known (rate, in a file of nodes)")
    elif best is not None and tier is None and _alike(facts, best):
        ttft_s = facts.last_ttft_s
        assert ttft_s is not None
        why.append(f"its last start took {human_seconds(ttft_s)}")
    # A peer gives what it has: the replica would be here.
    if facts.kind == "peer":
        why.append("for a replica on this machine, from that peer")
    needed = 0 if tier == "warm" else here.needed
    place = _place(facts.name, facts.kind, needed, facts.available, ttft_s, best, why)
    if facts.state == "failed":
        place["fits"] = False
    return {**place, "weights": facts.weights, "url": facts.url}


def ranked(places: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best first: where it fits, by the time to the first token; then what cannot be."""

    def order(place: dict[str, Any]) -> tuple[bool, bool, float, int]:
        ttft_s = math.inf if place["ttft_s"] is None else place["ttft_s"]
        # Where all bytes hide behind the worker's start, those that are nearer leave more to spare.
        near = list(_WEIGHTS).index(place["weights"] or "elsewhere")
        return not place["reachable"], place["fits"] is False, ttft_s, near

    return [{"rank": n, **place} for n, place in enumerate(sorted(places, key=order), 1)]


def _alike(facts: NodeFacts, start: Mapping[str, Any]) -> bool:
    """Whether a node's last start was such a one."""
    last = (facts.last_tier, facts.last_cache)
    return facts.last_ttft_s is not None and last == (start["tier"], start["cache"])


def _best(
    found: Sequence[Mapping[str, Any]], cache: str, tiers: Sequence[str]
) -> Mapping[str, Any] | None:
    """The first of some tiers that there is."""
    for tier in tiers:
        for start in found:
            same = (start["tier"], start["cache"], start["through"]) == (tier, cache, _THROUGH)
            if same and start["ttft_s"] is not None:
                return start
    return None


def _place(
    name: str,
    kind: str,
    needed: int,
    available: int | None,
    ttft_s: float | None,
    start: Mapping[str, Any] | None,
    why: list[str],
) -> dict[str, Any]:
    fits = None if available is None else needed <= available
    if fits is False:
        why = [f"it needs {human_bytes(needed)} of {human_bytes(available or 0)}", *why]
    tier = None if start is None else start["tier"]
    return {
        "name": name,
        "kind": kind,
        "reachable": True,
        "fits": fits,
        "needed": needed,
        "available": available,
        "weights": None,
        "tier": tier,
        "ttft_s": ttft_s,
        "why": why,
        "url": None,
    }


def _rate(document: Mapping[str, Any]) -> str:
    return f"{human_bytes(document['rate_bytes_per_s'])}/s ({document['rate_source']})"
