"""The runs of a cold document that have a timeline, and how to name one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import RequestError

__all__ = ["Run", "chosen_runs", "median_start", "runs_of"]


@dataclass(frozen=True, slots=True)
class Run:
    """One start.

    Args:
        cell: The cell's id.
        number: Which of the cell's runs, from 1 on.
        median: Whether it is the one nearest to the cell's median.
        ttft_s: Its time to the first token by the clock outside.
        timeline: As `Timeline.to_json` makes it.
    """

    cell: str
    number: int
    median: bool
    ttft_s: float
    timeline: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.cell} #{self.number}"


def median_start(cell: dict[str, Any]) -> int | None:
    """Which of a cell's starts that have a timeline is nearest to its median TTFT."""
    told = [i for i, start in enumerate(cell["starts"]) if start["timeline"] is not None]
    median = cell["ttft"]["median"]
    return min(told, key=lambda i: abs(cell["starts"][i]["ttft_s"] - median), default=None)


def runs_of(document: dict[str, Any]) -> list[Run]:
    """All runs of a document that have a timeline, in its order; none but for a cold one."""
    found = []
    for cell in document.get("cells", []) if document["kind"] == "cold" else []:
        median = median_start(cell)
        for number, start in enumerate(cell["starts"]):
            if start["timeline"] is not None:
                ttft_s, timeline = start["ttft_s"], start["timeline"]
                found.append(Run(cell["id"], number + 1, number == median, ttft_s, timeline))
    return found


def chosen_runs(documents: list[dict[str, Any]], wanted: str | None) -> list[Run]:
    """The runs that `--run` names.

    Args:
        documents: Of any kinds.
        wanted: `CELL` for the median run of a cell, `CELL:N` for its Nth run, None for all.

    Raises:
        RequestError: There is no such run.
    """
    runs = [run for document in documents for run in runs_of(document)]
    if wanted is None:
        return runs
    found = [run for run in runs if run.cell == wanted and run.median]
    if not found:
        cell, _, number = wanted.rpartition(":")
        found = [run for run in runs if run.cell == cell and str(run.number) == number]
    if not found:
        known = ", ".join(dict.fromkeys(run.cell for run in runs)) or "none with a timeline"
        raise RequestError(
            "there is no such run",
            where="--run",
            expected=f"CELL or CELL:N, of {known}"[:400],
            got=wanted,
            hint="Name a cell by its id, and one of its runs from 1 on.",
        )
    return found
