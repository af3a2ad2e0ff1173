"""What a part of the run has found, line by line, so that a part that is killed loses nothing.

A part is a process of its own. It appends a line of JSON for each thing that it finds; whoever
started it reads them when it has ended, in whichever way.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coldframe.benchmarks.harness import Row

__all__ = ["Check", "Found", "LeftOut", "Report", "Setting"]


class LeftOut(Exception):
    """Something that this machine does not allow to be looked at; it says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check of correctness.

    Args:
        name: What is checked.
        outcome: `passed`, `failed` or `skipped`.
        reason: Why it was not passed.
    """

    name: str
    outcome: str
    reason: str | None = None


@dataclass(slots=True)
class Found:
    """Everything that parts have found so far.

    Attributes:
        rows: The figures.
        answers: What is not a figure: by question.
        left_out: What was not looked at, and why.
        checks: What was checked.
        kept: What later parts are to know, and nobody else.
    """

    rows: list[Row] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(file: Path) -> Found:
        """What a part has written; a line that was cut off by its end is dropped.

        Of two figures of one name the later counts, in the place of the earlier.
        """
        found, rows = Found(), dict[str, Row]()
        if not file.exists():
            return found
        for line in file.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            kind, *values = json.loads(line)
            if kind == "row":
                row = Row(**values[0])
                rows[row.name] = row
            elif kind == "check":
                found.checks.append(Check(**values[0]))
            else:
                by_name = {"answer": found.answers, "keep": found.kept, "left_out": found.left_out}
                by_name[kind][values[0]] = values[1]
        found.rows = list(rows.values())
        return found

    def add(self, other: Found) -> None:
        """Takes what another has, too."""
        self.rows += other.rows
        self.answers |= other.answers
        self.left_out |= other.left_out
        self.checks += other.checks
        self.kept |= other.kept

    def median(self, name: str) -> float:
        """The median of a figure.

        Raises:
            LeftOut: It was not measured.
        """
        for row in self.rows:
            if row.name == name:
                return statistics.median(row.runs)
        raise LeftOut(f"nothing to compare with: there is no figure '{name}'")

    def need(self, name: str) -> Any:
        """What an earlier part has kept.

        Raises:
            LeftOut: It has not.
        """
        if name not in self.kept:
            raise LeftOut(f"what it needs is missing: {name}")
        return self.kept[name]


class Report:
    """Takes what one part finds.

    Args:
        file: Where it is written.
        earlier: What the parts before it have found.
    """

    def __init__(self, file: Path, earlier: Found | None = None) -> None:
        self._file = file.open("a", encoding="utf-8")
        self.earlier = earlier or Found()

    def figure(self, row: Row) -> None:
        """A figure; told again, with more runs, it takes its own place."""
        self._write("row", asdict(row))

    def answer(self, question: str, value: Any) -> None:
        """Something that was found out, and that is no figure with runs."""
        self._write("answer", question, value)

    def keep(self, name: str, value: Any) -> None:
        """Something that later parts need."""
        self._write("keep", name, value)

    def left_out(self, what: str, reason: str) -> None:
        self._write("left_out", what, reason)

    def check(self, check: Check) -> None:
        self._write("check", asdict(check))

    def close(self) -> None:
        self._file.close()

    def _write(self, *line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@dataclass(frozen=True, slots=True)
class Setting:
    """What every part is told.

    Args:
        device: The GPU, as `cuda:0`.
        scratch: A directory of the run's own, which goes with it.
        seconds: How long the part may take.
        nbytes: How many bytes a copy is measured with.
        runs: How often a figure is measured, where that does not take long.
        shape: Which model is started, of `model.SHAPES`; empty chooses by what there is room for.
    """

    device: str
    scratch: str
    seconds: float
    nbytes: int = 4 << 30
    runs: int = 5
    shape: str = ""

    @property
    def ordinal(self) -> int:
        return int(self.device.rpartition(":")[2])
