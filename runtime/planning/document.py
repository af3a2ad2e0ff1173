"""What a plan says: the document of one model on one device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Layout, Plan, Rank
from coldframe.loader.sources.base import Origin
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.machine.probe import Bandwidth, probe, probe_cold
from coldframe.runtime.planning.law import Path
from coldframe.runtime.planning.prediction import MemoryPrediction
from coldframe.runtime.planning.rates import Rates
from coldframe.runtime.planning.starts import replicas, starts
from coldframe.runtime.planning.target import Target

__all__ = ["Subject", "paths_of", "plan_document", "ranks_of"]

FIRST_BYTE_S = 0.1
"""From the exec to the first byte asked for, where no start was rehearsed."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned.

    Args:
        name: MODEL, without credentials.
        origin: Where it is.
        checkpoint: As it was opened there.
        plan: Its plan.
        spec: Its shape.
        maps: Whether weights in the page cache are mapped where they lie.
        context: Tokens of each sequence.
        batch: Sequences at once.
        prompt_tokens: Of the first prompt.
    """

    name: str
    origin: Origin
    checkpoint: Checkpoint
    plan: Plan
    spec: ModelSpec
    maps: bool
    context: int
    batch: int
    prompt_tokens: int


def paths_of(
    subject: Subject, rate: float | None
) -> tuple[Bandwidth, dict[str, Path | str], Bandwidth | None]:
    """How the weights come: now, by the state of the page cache, and from the disk itself.

    Args:
        subject: What is planned.
        rate: The path's bandwidth where it is given, which a load is held to then: such a load is
            streamed, whatever is in the page cache.

    Raises:
        SourceError: The weights cannot be read.
    """
    if rate is not None:
        return Bandwidth(rate, "given"), dict.fromkeys(("cold", "warm"), Path(rate)), None
    now = probe(subject.origin, subject.checkpoint, subject.plan, maps=subject.maps)
    if subject.origin.path is None:
        far = Path(now.rate, stream_s=now.processor_s)
        return now, {"cold": far, "warm": "no page cache has what is elsewhere"}, None
    disk = probe_cold(subject.checkpoint, subject.plan)
    warm = Path(math.inf) if subject.maps else Path(now.rate)
    return now, {"cold": Path(disk.rate), "warm": warm}, disk


def plan_document(
    subject: Subject,
    target: Target,
    rate: float | None,
    rates: Rates,
    worker_start_s: float | None,
) -> dict[str, Any]:
    """The document.

    Args:
        subject: What is planned.
        target: Where it is to run.
        rate: See `paths_of`.
        rates: What starts take here; without cells where that was not measured.
        worker_start_s: How long a fresh worker takes, where that alone was measured.

    Raises:
        SourceError: The weights cannot be read.
    """
    plan = subject.plan
    now, paths, disk = paths_of(subject, rate)
    memory = _memory(subject, target, rates)
    stages, done = [], 0
    for stage in plan.stages:
        done += stage.nbytes
        ready = {"bytes": stage.nbytes, "extents": len(stage.extents), "ready_s": done / now.rate}
        stages.append({"name": stage.name, **ready})
    found = starts(rates, plan, paths, target.choice.device)
    load_s = plan.read_bytes / now.rate
    next_start = _next(found, cached=now.rate == math.inf)
    fresh = rates.cells.get("fresh/run/copied")
    worker_s = worker_start_s if fresh is None else fresh.worker.up_s
    ttft_s = max(FIRST_BYTE_S + load_s, worker_s or 0.0)
    if next_start is not None:
        ttft_s = next_start["ttft_s"]
    return {
        "model": subject.name,
        "family": subject.spec.family,
        "dtype": subject.spec.dtype,
        "layout": plan.layout,
        "plan_hash": plan.hash,
        "weights_bytes": plan.weights_bytes,
        "read_bytes": plan.read_bytes,
        "skipped": list(plan.skipped),
        "stages": stages,
        "context": subject.context,
        "batch": subject.batch,
        "prompt_tokens": subject.prompt_tokens,
        "memory": memory,
        "device": target.choice.device,
        "device_why": target.choice.why,
        "gpu": None if target.gpu is None else target.gpu["name"],
        "kv_default": target.kv_default(plan, subject.spec),
        "rate_bytes_per_s": None if now.rate == math.inf else now.rate,
        "rate_source": now.source,
        "disk_bytes_per_s": None if disk is None else disk.rate,
        "predicted_load_s": load_s,
        "worker_start_s": worker_s,
        "predicted_ttft_s": ttft_s,
        "next_start": None
        if next_start is None
        else {key: next_start[key] for key in ("tier", "cache", "through")},
        "starts": found,
        "calibration": rates.to_json(),
    }


def _memory(subject: Subject, target: Target, rates: Rates) -> dict[str, Any]:
    plan, spec = subject.plan, subject.spec
    predicted: MemoryPrediction = target.predict(
        plan, spec, context=subject.context, batch=subject.batch
    )
    cell = next((c for n, c in rates.cells.items() if n.startswith("fresh/http/")), None)
    own = None if cell is None else cell.memory.own
    measured = own if target.gpu is None else rates.device_bytes
    overhead = predicted.overhead if measured is None else measured
    return {
        "weights": predicted.weights,
        "kv": predicted.kv,
        "activations": predicted.activations,
        "overhead": overhead,
        "overhead_source": "assumed" if measured is None else "measured",
        "total": predicted.total - predicted.overhead + overhead,
        "available": target.available,
        "replica": replicas(rates, plan, spec) if target.gpu is None and rates.layers else [],
    }


def _next(found: list[dict[str, Any]], *, cached: bool) -> dict[str, Any] | None:
    """What `coldframe run` would be at this moment: the best tier that there is."""
    cache = "warm" if cached else "cold"
    there = [
        start
        for start in found
        if start["through"] == "run" and start["cache"] == cache and start["ttft_s"] is not None
    ]
    by_tier = {start["tier"]: start for start in there}
    return next((by_tier[t] for t in ("restored", "template", "fresh") if t in by_tier), None)


def ranks_of(checkpoint: Checkpoint, ranks: int) -> list[dict[str, int]]:
    """What each tensor-parallel rank holds and reads; empty for a model that is not divided."""
    found = []
    for index in range(ranks if ranks > 1 else 0):
        plan = Plan.build(checkpoint, layout=Layout.ALIGNED, rank=Rank(index, ranks))
        found.append(
            {
                "rank": index,
                "weights_bytes": plan.weights_bytes,
                "read_bytes": plan.read_bytes,
                "extents": sum(len(stage.extents) for stage in plan.stages),
            }
        )
    return found
