"""The runs of a cell to its figures: times, the law of the cold start, stages, memory, tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from coldframe.benchmarks.cold.contender import Outcome
from coldframe.benchmarks.cold.explain import UNATTRIBUTED, Key, busy_times, load_s
from coldframe.benchmarks.cold.matrix import Cell
from coldframe.benchmarks.cold.prediction import predicted
from coldframe.benchmarks.cold.starts import Start
from coldframe.benchmarks.document import figure

__all__ = [
    "THROTTLE",
    "Measured",
    "Rival",
    "cell_document",
    "rival_document",
    "tokens_differ",
]

THROTTLE = "the throttle"


@dataclass(slots=True)
class Measured:
    """A cell of ours, and what was measured of it so far.

    Args:
        cell: The cell.
        nbytes: What a start of it loads, in bytes; 0 where the weights are there already.
        plan: What `coldframe plan` says of it, or None.
        evicted: Whether the page cache was shown to have nothing of the files before each run; None
            where nothing was to be evicted.
        starts: Its runs.
        ceilings: The measured rate of its path in the round of each run, in bytes a second; empty
            where the path has none.
        ceiling_how: What the ceiling is.
        image_bytes: What the images that its workers are made of take in their store, or None. They
            are no part of `nbytes`, though they come from the same disk.
    """

    cell: Cell
    nbytes: int
    plan: Mapping[str, Any] | None = None
    evicted: bool | None = None
    starts: list[Start] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)
    ceiling_how: str | None = None
    image_bytes: int | None = None


@dataclass(slots=True)
class Rival:
    """Another program, and what was measured of it so far; see `Measured`."""

    name: str
    through: str
    cache: str
    nbytes: int
    evicted: bool | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)
    ceiling_how: str | None = None

    @property
    def id(self) -> str:
        return f"{self.name}/{self.cache}/disk/{self.through}"


def tokens_differ(
    tokens: Sequence[Sequence[int]], reference: Sequence[int]
) -> dict[str, Any] | None:
    """The first run whose tokens are not the reference's, or None."""
    for run, got in enumerate(tokens):
        if list(got) == list(reference):
            continue
        pairs = enumerate(zip(got, reference, strict=False))
        at = next((at for at, (a, b) in pairs if a != b), min(len(got), len(reference)))
        return {"run": run, "at": at, "expected": list(reference), "got": list(got)}
    return None


def cell_document(measured: Measured, reference: Sequence[int]) -> dict[str, Any]:
    """A cell with at least one run, as the document has it.

    Args:
        measured: The cell.
        reference: The tokens that every cell is to give.
    """
    cell, starts = measured.cell, measured.starts
    ttft = [start.ttft_s for start in starts]
    memory = [start.memory for start in starts if start.memory is not None]
    timelines = [start.timeline for start in starts if start.timeline is not None]
    limits = _limits(measured)
    rates = [rate for rate, _ in limits]
    # What is mapped was not moved: there is no time to hold against. See `Start.mapped`.
    moves = [
        measured.nbytes / rate
        for start, rate in zip(starts, rates, strict=False)
        if rate is not None and not start.mapped
    ]
    moved = len(moves) == len(starts) and measured.nbytes > 0
    loads = [load_s(timeline) for timeline in timelines]
    copied = [load for load in loads if load is not None]
    differs = tokens_differ([start.tokens for start in starts], reference)
    return {
        "id": cell.id,
        "who": "coldframe",
        "tier": cell.tier,
        "cache": cell.cache,
        "source": cell.source,
        "throttle": cell.throttle,
        "engine": cell.engine,
        "through": cell.through,
        "clock": "request" if cell.rests else "exec",
        "mapped": all(start.mapped for start in starts),
        "ttft": figure(ttft, "s"),
        "last_token": figure([start.last_token_s for start in starts], "s"),
        "bytes": measured.nbytes,
        "image_bytes": measured.image_bytes,
        "ceiling": {
            "rate": figure([rate for rate in rates if rate is not None], "B/s"),
            "how": _how([how for _, how in limits]),
        }
        if moved
        else None,
        "move": figure(moves, "s") if moved else None,
        "ratio": figure([a / b for a, b in zip(ttft, moves, strict=True)], "1") if moved else None,
        "rate": figure([measured.nbytes / load for load in copied], "B/s")
        if len(copied) == len(starts) and not any(start.mapped for start in starts)
        else None,
        "memory": figure(memory, "B") if len(memory) == len(starts) else None,
        "unattributed": figure([start.path.get(UNATTRIBUTED, 0.0) for start in starts], "s")
        if len(timelines) == len(starts)
        else None,
        "stages": _stages(timelines),
        "path": _shares([start.path for start in starts]),
        "tokens": list(starts[0].tokens),
        "tokens_equal": differs is None,
        "differs": differs,
        "evicted": measured.evicted,
        "prediction": predicted(
            measured.plan,
            cell,
            ttft_s=median(ttft),
            memory=median(memory) if memory else None,
            mapped=all(start.mapped for start in starts),
        ),
        "starts": [
            {
                "ttft_s": start.ttft_s,
                "last_token_s": start.last_token_s,
                "tier": cell.tier,
                "memory_bytes": start.memory,
                "timeline": start.timeline,
            }
            for start in starts
        ],
    }


def rival_document(rival: Rival, reference: Sequence[int]) -> dict[str, Any]:
    """The cell of another program: what can be seen of it from outside."""
    outcomes = rival.outcomes
    memory = [outcome.memory for outcome in outcomes if outcome.memory is not None]
    differs = tokens_differ([outcome.tokens for outcome in outcomes], reference)
    ttft = [outcome.ttft_s for outcome in outcomes]
    moves = [rival.nbytes / rate for rate in rival.ceilings]
    return {
        "id": rival.id,
        "who": rival.name,
        "tier": "fresh",
        "cache": rival.cache,
        "source": "disk",
        "throttle": None,
        "engine": "vllm" if rival.name.startswith("vllm") else "transformers",
        "through": rival.through,
        "clock": "exec",
        "mapped": None,
        "ttft": figure(ttft, "s"),
        "last_token": figure([outcome.last_token_s for outcome in outcomes], "s"),
        "bytes": rival.nbytes,
        "ceiling": {"rate": figure(rival.ceilings, "B/s"), "how": rival.ceiling_how}
        if moves
        else None,
        "move": figure(moves, "s") if moves else None,
        "ratio": figure([a / b for a, b in zip(ttft, moves, strict=True)], "1") if moves else None,
        "rate": None,
        "memory": figure(memory, "B") if len(memory) == len(outcomes) else None,
        "unattributed": None,
        "stages": [],
        "path": [],
        "tokens": list(outcomes[0].tokens),
        "tokens_equal": differs is None,
        "differs": differs,
        "evicted": rival.evicted,
        "prediction": None,
        "starts": [
            {
                "ttft_s": outcome.ttft_s,
                "last_token_s": outcome.last_token_s,
                "tier": None,
                "memory_bytes": outcome.memory,
                "timeline": None,
            }
            for outcome in outcomes
        ],
    }


def _limits(measured: Measured) -> list[tuple[float | None, str]]:
    """What limits the path in each run, and which limit that is.

    It is what was measured of the path, or the throttle where that is lower.
    """
    throttle, path = measured.cell.throttle, measured.ceiling_how or ""
    if not measured.ceilings:
        return [(throttle, THROTTLE)] * len(measured.starts)
    return [
        (rate, path) if throttle is None or rate <= throttle else (throttle, THROTTLE)
        for rate in measured.ceilings
    ]


def _how(limits: Sequence[str]) -> str:
    """Which limits those of a cell's runs were; how often each where there are several."""
    counts = Counter(limits)
    if len(counts) == 1:
        return limits[0]
    return "; ".join(f"{how} ({count} of {len(limits)} runs)" for how, count in counts.items())


def _stages(timelines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Busy times by stage; a run that had no such stage has no time of it."""
    runs = [busy_times(timeline) for timeline in timelines]
    keys = dict.fromkeys(key for run in runs for key in run)
    found = []
    for process, name in keys:
        mine = [run.get((process, name)) for run in runs]
        found.append(
            {
                "process": process,
                "name": name,
                "seconds": figure([0.0 if b is None else b.seconds for b in mine], "s"),
                "overlap": figure([0.0 if b is None else b.overlap for b in mine], "s"),
                "beside_weights": figure(
                    [0.0 if b is None else b.beside_weights for b in mine], "s"
                ),
            }
        )
    return found


def _shares(paths: Sequence[Mapping[Key, float]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for path in paths for key in path)
    return [
        {
            "process": process,
            "name": name,
            "seconds": figure([path.get((process, name), 0.0) for path in paths], "s"),
        }
        for process, name in keys
    ]
