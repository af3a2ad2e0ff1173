"""The starts of a plan: the time to the first token of each tier, and the memory of its replica.

What is null cannot be had here, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coldframe.loader.cgroup import cpu_count
from coldframe.loader.checkpoints.plan import Plan
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.planning.law import CACHES, Path, Worker, predict
from coldframe.runtime.planning.rates import Rates

__all__ = ["CACHES", "THROUGH", "TIERS", "replicas", "starts"]

TIERS = ("fresh", "template", "restored", "parked", "warm")
THROUGH = ("run", "http")
_RESTS = ("parked", "warm")


def starts(
    rates: Rates, plan: Plan, paths: dict[str, Path | str], device: str = CPU
) -> list[dict[str, Any]]:
    """Every start, in the order of the tiers.

    Args:
        rates: What was measured.
        plan: The model's.
        paths: By `cold` and `warm`, how the weights come; or why they do not come like that. At
            an infinite rate they are mapped where they lie.
        device: Where workers compute.
    """
    found = []
    for tier in TIERS:
        for cache in CACHES:
            for through in THROUGH:
                start: dict[str, Any] = {"tier": tier, "cache": cache, "through": through}
                if tier in _RESTS:
                    start |= _rest(rates, plan, tier, through, device)
                else:
                    start |= _cold(rates, plan, tier, paths[cache], through, device)
                found.append(start)
    return found


def _cold(
    rates: Rates, plan: Plan, tier: str, path: Path | str, through: str, device: str
) -> dict[str, Any]:
    if isinstance(path, str):
        return _none(path)
    worker = _worker(rates, tier, through, mapped=path.rate == math.inf)
    if worker is None:
        return _none(_why_none(rates, tier))
    stages = [stage.nbytes for stage in plan.stages]
    found = predict(
        replace(worker, head_s=worker.head_s / rates.head_share),
        path,
        stages,
        cpu_count(),
        computes_there=device == CPU,
    )
    return {"ttft_s": found.ttft_s, "parts": found.parts, "why": None}


def _worker(rates: Rates, tier: str, through: str, *, mapped: bool) -> Worker | None:
    """The cell that was measured, or what two of them make of it.

    Where weights lie is a matter of computing, how it is asked one of coming up.
    """
    wanted, other = ("mapped", "copied") if mapped else ("copied", "mapped")
    cell = rates.cells.get(f"{tier}/{through}/{wanted}")
    if cell is not None:
        return cell.worker
    up = rates.cells.get(f"{tier}/{through}/{other}")
    computing = rates.cells.get(f"{tier}/run/{wanted}")
    if up is None or computing is None:
        return None
    return replace(
        computing.worker,
        first_byte_s=up.worker.first_byte_s,
        up_s=up.worker.up_s,
        out_s=up.worker.out_s,
        busy=up.worker.busy,
        streamed=up.worker.streamed,
    )


def _rest(rates: Rates, plan: Plan, tier: str, through: str, device: str) -> dict[str, Any]:
    """Of a replica that is there: nothing of it depends on a cache of the disk's."""
    if through == "run":
        return _none("a run ends with its answer")
    copied = rates.cells.get("fresh/run/copied")
    rest = rates.rests.get(tier)
    if rest is None or copied is None:
        return _none(_why_none(rates, tier))
    parts = {"replica": rest}
    if tier == "parked" and device != CPU:
        # The bytes of the scale model came over the link, too.
        link = max(0.0, rest - rates.rests["warm"])
        parts["weights"] = link * (plan.weights_bytes / rates.nbytes - 1)
    worker = copied.worker
    further = len(plan.stages) - 2 - rates.layers
    parts["prefill"] = further * worker.layer_s + worker.head_s * (1 / rates.head_share - 1)
    return {"ttft_s": sum(parts.values()), "parts": parts, "why": None}


def _why_none(rates: Rates, tier: str) -> str:
    """Why nothing was measured of a tier: where fresh starts could not be, none was."""
    return rates.why.get(tier) or rates.why.get("fresh") or "it was not rehearsed"


def _none(why: str) -> dict[str, Any]:
    return {"ttft_s": None, "parts": {}, "why": why}


def replicas(rates: Rates, plan: Plan, spec: ModelSpec) -> list[dict[str, Any]]:
    """The memory of each replica on a CPU: PSS of all its processes after a short answer.

    Weights and KV are the model's, what processes have for themselves is as measured.
    """
    found = []
    for tier in TIERS[:3]:
        for through in THROUGH:
            for weights in ("mapped", "copied"):
                own = _own(rates, tier, through, weights)
                cell = rates.cells.get(f"{tier}/{through}/{weights}") or next(
                    (c for name, c in rates.cells.items() if name.startswith(f"{tier}/{through}/")),
                    None,
                )
                if own is None or cell is None:
                    continue
                # Rows of an untied embedding that no token of the prompt has are not touched.
                untouched = max(0, rates.nbytes - cell.memory.weights) / rates.head_share
                parts = {
                    "processes": own,
                    "weights": max(0, plan.weights_bytes - round(untouched)),
                    "kv": cell.memory.kv * spec.layers // rates.layers,
                }
                found.append(
                    {
                        "tier": tier,
                        "through": through,
                        "weights": weights,
                        "pss": sum(parts.values()),
                        "parts": parts,
                    }
                )
    return found


def _own(rates: Rates, tier: str, through: str, weights: str) -> int | None:
    """What processes have for themselves, as `_worker` has the times."""
    cell = rates.cells.get(f"{tier}/{through}/{weights}")
    if cell is not None:
        return cell.memory.own
    other = "copied" if weights == "mapped" else "mapped"
    names: Sequence[str] = (
        f"{tier}/{through}/{other}",
        f"{tier}/run/{weights}",
        f"{tier}/run/{other}",
    )
    cells = [rates.cells.get(name) for name in names]
    if any(cell is None for cell in cells):
        return None
    through_it, run, run_other = (cell.memory.own for cell in cells if cell is not None)
    return through_it + run - run_other
