"""Where a simulation's times come from, when they are not measured for it.

Of a document that `bench replay` or `bench cold` has printed, of `coldframe plan`'s prediction, or
those of the machine that the README's figures are from.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from coldframe.benchmarks.document import parsed, percentile
from coldframe.benchmarks.harness import coldframe_command
from coldframe.benchmarks.traffic.stages import Line, Times
from coldframe.loader.errors import PlatformError, RequestError

__all__ = ["DEFAULTS", "DEFAULT_CONTEXT", "of_plan", "predicted", "read_times"]

DEFAULTS = Times(
    fresh=[0.76],
    restored=[0.44],
    parked=[0.005],
    end=[0.12],
    prefill=Line(0.010, 0.0004),
    decode=Line(0.0095, 0.0018),
    how="another machine's: the 210 M demo model on two cores of an AMD EPYC, weights in the page "
    "cache, as the README has it",
)
"""A first token over HTTP takes 0.13 s more than by `run` fresh (0.64 s), 0.17 s restored (0.28 s);
80 tokens a second alone, 337 as a batch of eight."""
DEFAULT_CONTEXT = 1024
"""Of that model, in tokens."""
_PLAN_S = 300.0


def read_times(path: Path) -> Times:
    """The times that a document has: of `bench replay`, of `bench cold`, or these alone.

    Args:
        path: A file whose last line it is, or all of it.

    Raises:
        RequestError: It is none of these.
    """
    try:
        found = parsed(path.read_text(encoding="utf-8"))
        if found is None:
            raise ValueError("no JSON document")
        if found.get("kind") == "cold":
            return _of_cold(found, str(path))
        return Times.from_json(found.get("start_times", found), str(path))
    except (OSError, ValueError, IndexError, AttributeError) as error:
        raise RequestError(
            "this is no document with times of a model's stages",
            where=path,
            expected="what `coldframe bench replay` or `coldframe bench cold` prints last",
            got=f"{type(error).__name__}: {error}",
        ) from error


def predicted(model: Path) -> Times:
    """What `coldframe plan` predicts of starts; what it says nothing of is as in `DEFAULTS`.

    Raises:
        PlatformError: There is no such prediction.
    """
    # In another process: it imports torch.
    command = [*coldframe_command(), "plan", str(model), "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PLAN_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise PlatformError("a prediction did not end", where=" ".join(command)) from error
    if done.returncode:
        raise PlatformError(
            "there is no prediction", where=" ".join(command), got=done.stderr.strip()
        )
    return of_plan(json.loads(done.stdout.splitlines()[-1]), str(model))


def of_plan(found: Mapping[str, Any], model: str) -> Times:
    """The times that a document of `coldframe plan` predicts.

    Args:
        found: The document. Where it has no `starts` by tier, the one that it predicts is one with
            fresh processes.
        model: What it is of.
    """
    told = [start for start in found.get("starts", ()) if start["ttft_s"] is not None]
    likest = sorted(told, key=lambda s: (s["through"] != "http", s["cache"] != "warm"))
    by_tier: dict[str, float] = {}
    for start in likest:
        by_tier.setdefault(start["tier"], float(start["ttft_s"]))
    fresh_s = by_tier.pop("fresh", float(found["predicted_ttft_s"]))
    # A start is what its first token takes longer than a warm replica's.
    warm_s = by_tier.pop("warm", None)
    beyond = {tier: [max(0.0, ttft_s - (warm_s or 0.0))] for tier, ttft_s in by_tier.items()}
    known = [tier for tier in ("restored", "parked") if tier in beyond]
    tiers = " and ".join(["fresh", *known])
    return replace(
        DEFAULTS,
        fresh=[max(0.0, fresh_s - (warm_s or 0.0))],
        restored=beyond.get("restored", []),
        parked=beyond.get("parked", DEFAULTS.parked),
        how=f"starts ({tiers}) as `coldframe plan {model}` predicts them, all else {DEFAULTS.how}",
    )


def _of_cold(found: Mapping[str, Any], where: str) -> Times:
    """Of the cells of coldframe's own native engine that are most like a server's.

    A start takes what its first token takes longer than a warm replica's. How long a prompt takes
    is known of one length: the time is taken to be in proportion to it.
    """
    try:
        warm = _cell(found["cells"], "warm")
        if warm is None:
            raise RequestError("there is no cell of a warm replica", where=where)
        warm_s = float(warm["ttft"]["median"])
        ended = [float(run) for run in warm["last_token"]["runs"]]
        first = [float(run) for run in warm["ttft"]["runs"]]
        steps = max(1, int(found["answer_tokens"]) - 1)
        step_s = max(0.0, percentile(ended, 0.5) - percentile(first, 0.5)) / steps

        def beyond(tier: str) -> list[float]:
            cell = _cell(found["cells"], tier)
            runs = [] if cell is None else cell["ttft"]["runs"]
            return [max(0.0, float(run) - warm_s) for run in runs]

        return Times(
            fresh=beyond("fresh"),
            restored=beyond("restored"),
            parked=beyond("parked"),
            end=DEFAULTS.end,
            prefill=Line(0.0, warm_s / max(1, int(found["prompt_tokens"]))),
            decode=Line(step_s, 0.0),
            how=f"{where}: bench cold; the time to end a replica is {DEFAULTS.how}",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            "this is no document of `bench cold`",
            where=where,
            got=f"{type(error).__name__}: {error}",
        ) from error


def _cell(cells: Sequence[Mapping[str, Any]], tier: str) -> Mapping[str, Any] | None:
    ours = [
        cell
        for cell in cells
        if (cell["tier"], cell["who"], cell["engine"]) == (tier, "coldframe", "native")
        and cell["throttle"] is None
    ]
    likest = sorted(
        ours,
        key=lambda cell: (
            cell["through"] != "http",
            cell["source"] != "disk",
            cell["cache"] != "warm",
        ),
    )
    return next(iter(likest), None)
