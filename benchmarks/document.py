"""What a benchmark says last: one JSON document of a kind, by `schema.json`.

A *figure* is what was measured several times: its unit, the runs as they came, and their median,
90th percentile, least and greatest. Percentiles lie between two runs where they fall there, in
proportion, as NumPy's do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coldframe.benchmarks.harness import fingerprint

__all__ = [
    "SCHEMA",
    "VERSION",
    "document",
    "figure",
    "parsed",
    "percentile",
    "print_document",
]

VERSION = 1
SCHEMA = Path(__file__).with_name("schema.json")
"""JSON Schema (2020-12) of every document; `$defs` has one entry for each kind."""


def percentile(values: Sequence[float], share: float) -> float:
    """A percentile of some values, which need no order.

    Args:
        values: At least one.
        share: From 0 (the least) to 1 (the greatest).
    """
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def figure(runs: Sequence[float], unit: str) -> dict[str, Any]:
    """What was measured several times, as JSON values.

    Args:
        runs: At least one, in the order in which they were made.
        unit: `s`, `B`, `B/s`, `tok/s`, `1` for a ratio.
    """
    return {
        "unit": unit,
        "median": percentile(runs, 0.5),
        "p90": percentile(runs, 0.9),
        "min": min(runs),
        "max": max(runs),
        "runs": list(runs),
    }


def document(kind: str, **parts: Any) -> dict[str, Any]:
    """A document of a kind, with what all of them have.

    Args:
        kind: One that the schema has.
        parts: Its own; `fingerprint` where more is told of the machine than of every other kind.
    """
    told = parts.pop("fingerprint", None)
    return {"schema": VERSION, "kind": kind, **parts, "fingerprint": told or fingerprint()}


def print_document(found: dict[str, Any]) -> None:
    """Prints a document as the last line of stdout."""
    print(json.dumps(found, allow_nan=False), flush=True)


def parsed(text: str) -> dict[str, Any] | None:
    """The JSON object that is the whole of a text, or its last line; None where there is none."""
    lines = text.rstrip().splitlines()
    for part in (text, lines[-1] if lines else ""):
        try:
            found = json.loads(part, parse_constant=_no_number)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")
