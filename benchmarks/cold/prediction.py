"""What `coldframe plan` predicts of a cell, called as a process before the cell's first start.

Its document has `starts`, one for each way to start, and in `memory.replica` what the processes of
a replica take together. Nothing is handed over of what the benchmark has measured.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from coldframe.benchmarks.cold.matrix import Cell
from coldframe.benchmarks.harness import coldframe_command
from coldframe.benchmarks.within import run_within
from coldframe.loader.errors import PlatformError

__all__ = [
    "NoPlan",
    "plan_of",
    "predicted",
    "predicted_memory",
    "predicted_ttft",
    "unpredicted",
]

_LIMIT_S = 600.0
_END_S = 15.0


class NoPlan(PlatformError):
    """A cell has no prediction; it can be measured all the same."""


def plan_of(
    uri: str,
    cell: Cell,
    environment: Mapping[str, str],
    prompt: int,
    tokens: int,
    rehearsals: int = 1,
    rest_s: float = 0.0,
) -> dict[str, Any]:
    """The document of `coldframe plan --json` for the conditions of a cell.

    Args:
        uri: Where its weights are.
        cell: The cell.
        environment: What its own command finds there.
        prompt: Tokens of the prompt.
        tokens: Of the answer.
        rehearsals: Of how many it takes the medians: one start is as lucky as one run is.
        rest_s: How long it rests before each.

    Raises:
        NoPlan: It failed.
    """
    command = [*coldframe_command(), "plan", uri, "--json", "--context", str(prompt + tokens)]
    command += ["--rehearsals", str(rehearsals), "--at-zero", str(rest_s)]
    if cell.throttle is not None:
        command += ["--rate", f"{cell.throttle:.0f}B/s"]
    try:
        # By its twin: the prompt's length is no flag of every version's.
        found_there = {**os.environ, **environment, "COLDFRAME_PROMPT_TOKENS": str(prompt)}
        done = run_within(command, _LIMIT_S, found_there, _END_S)
    except subprocess.TimeoutExpired as error:
        raise NoPlan(
            "a plan was not made", where=" ".join(command), expected=f"within {_LIMIT_S:g} s"
        ) from error
    if done.returncode:
        raise NoPlan(
            "a plan cannot be made", where=" ".join(command), got=done.stderr.strip()[-1000:]
        )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise NoPlan(
            "a plan says nothing", where=" ".join(command), got=done.stdout[-300:] or "no word"
        ) from error
    return found


def unpredicted(cell: Cell) -> str | None:
    """Why a plan says nothing of a cell's first token; None where it may.

    The first token is the native workers', whoever decodes; so where the engine comes up behind it,
    or is there and idle, a plan for these holds.
    """
    if cell.engine == "vllm" and not cell.rests:
        return (
            "a vLLM engine comes up beside the workers that make the first token, and what it "
            "takes of the processors meanwhile is in no rehearsal of `coldframe plan`"
        )
    return None


def predicted_ttft(plan: Mapping[str, Any], cell: Cell) -> tuple[float | None, str | None]:
    """Seconds to the first token; and why there is no prediction, where there is none."""
    wanted = {"tier": cell.tier, "cache": cell.cache, "through": cell.through}
    entry = _match(plan.get("starts") or (), wanted)
    if entry is None:
        return None, "the plan says nothing of such a start"
    found = entry.get("ttft_s")
    return (None, entry.get("why")) if found is None else (float(found), None)


def predicted_memory(plan: Mapping[str, Any], cell: Cell, mapped: bool | None) -> float | None:
    """Bytes of PSS of the whole replica; None where the plan has none.

    Args:
        plan: The plan's document.
        cell: The cell.
        mapped: Whether the weights were mapped in place, not copied.
    """
    told = (plan.get("memory") or {}).get("replica")
    if told is None or isinstance(told, (int, float)):
        return told
    # What rests has started fresh.
    wanted = {
        "tier": "fresh" if cell.rests else cell.tier,
        "cache": cell.cache,
        "through": cell.through,
        "weights": "mapped" if mapped else "copied",
    }
    entries = [told] if isinstance(told, dict) else told
    entry = _match(entries, wanted)
    return None if entry is None else entry.get("pss", entry.get("bytes"))


def _match(entries: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> Any:
    """The entry that says of each thing what is wanted, or says nothing of it."""
    for entry in entries:
        if all(entry.get(name, value) == value for name, value in wanted.items()):
            return entry
    return None


def predicted(
    plan: Mapping[str, Any] | None,
    cell: Cell,
    *,
    ttft_s: float,
    memory: float | None,
    mapped: bool | None,
) -> dict[str, Any] | None:
    """A cell's prediction beside what was measured; errors are predicted/measured - 1.

    Args:
        plan: Its plan's document, or None where there is none.
        cell: The cell.
        ttft_s: The median that was measured.
        memory: Likewise, in bytes.
        mapped: Whether the weights were mapped in place.
    """
    if plan is None:
        return None
    ttft: float | None = None
    pss: float | None = None
    why = unpredicted(cell)
    if why is None:
        ttft, why = predicted_ttft(plan, cell)
    if cell.engine == "native":
        pss = predicted_memory(plan, cell, mapped)
    elif why is None:
        why = "the memory of a vLLM engine is not predicted"
    return {
        "ttft_s": ttft,
        "memory_bytes": pss,
        "ttft_error": None if ttft is None else ttft / ttft_s - 1,
        "memory_error": None if pss is None or memory is None else pss / memory - 1,
        "why": why,
    }
