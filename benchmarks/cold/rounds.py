"""All cells in turn, round by round, each round in another order.

A machine whose speed drifts drifts for all of them: a round has one start of each cell, one of each
contender, and one measurement of each path's own limit, which the starts of that round are held
against. What fails leaves the matrix, with its reason. Of a benchmark that is interrupted the
rounds that were finished are kept.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from coldframe.benchmarks.cold.ceiling import DIRECT, SOCKETS, ceiling_rate
from coldframe.benchmarks.cold.contender import Contender
from coldframe.benchmarks.cold.matrix import Cell
from coldframe.benchmarks.cold.prediction import NoPlan, plan_of, unpredicted
from coldframe.benchmarks.cold.progress import Progress
from coldframe.benchmarks.cold.sources import Sources, weight_files
from coldframe.benchmarks.cold.starts import Conditions, Starter
from coldframe.benchmarks.cold.summary import Measured, Rival
from coldframe.benchmarks.harness import evict_files
from coldframe.benchmarks.restores import files_in, read_s
from coldframe.loader.errors import ColdframeError, PlatformError

__all__ = ["Rounds"]

_LONGEST = 600


@dataclass(slots=True)
class Rounds:
    """The benchmark's rounds.

    Args:
        model: The checkpoint's directory.
        sources: Where weights come from.
        starter: Starts cells.
        prompt: Tokens of the prompt.
        tokens: Of each answer.
        cells: Those to be measured; what cannot be leaves the list.
        rivals: Contenders, and what was measured of them.
        left_out: Gets what cannot be measured, for the document.
        rehearsals: Of how many `coldframe plan` predicts; 0: it is not asked.
        rest_s: How long to rest before each start; see `runtime.machine.free_memory`.
        lost: Gets the ids of such cells.
        failed: Gets the ids of those that could be and have failed, contenders' cells among them.
        done: Rounds that are finished.
        interrupted: What has ended it before the last of them, or None.
    """

    model: Path
    sources: Sources
    starter: Starter
    prompt: int
    tokens: int
    cells: list[Measured]
    rivals: list[tuple[Contender, Rival]]
    left_out: list[dict[str, str]]
    rehearsals: int = 1
    rest_s: float = 0.0
    lost: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    done: int = 0
    interrupted: KeyboardInterrupt | None = None
    _plans: dict[Any, dict[str, Any]] = field(default_factory=dict)
    _ceilings: dict[str, str] = field(default_factory=dict)
    _images: dict[Cell, int] = field(default_factory=dict)

    def check(self, progress: Progress) -> None:
        """Finds out what can be measured here, and what `coldframe plan` says of it.

        All that stands ready is made for that, and each file is evicted once.
        """
        for measured in list(self.cells):
            cell = measured.cell
            progress.say(f"{cell.id}: what it needs, and its plan")
            try:
                with self.starter.conditions(cell) as conditions:
                    self._prepare(cell, conditions)
                    if self.rehearsals and self._may_be_predicted(cell):
                        measured.plan = self._plan(cell, conditions)
            except NoPlan as error:
                why = _short(error)
                self.left_out.append({"what": f"the prediction of {cell.id}", "why": why})
            except PlatformError as error:
                self._leave(measured, error)
        for pair in list(self.rivals):
            try:
                self._page_cache(pair[1].cache, weight_files(self.model))
            except PlatformError as error:
                self.rivals.remove(pair)
                self.left_out.append({"what": pair[1].id, "why": str(error)})
        ways = [way for measured in self.cells if (way := _way(measured.cell)) is not None]
        if any(rival.cache == "cold" for _, rival in self.rivals):
            ways.append("disk")
        for way in dict.fromkeys(ways):
            try:
                self._ceiling(way)
            except PlatformError as error:
                self.left_out.append({"what": f"the ceiling of {way}", "why": str(error)})
            else:
                self._ceilings[way] = DIRECT if way == "disk" else SOCKETS

    def warm_up(self, progress: Progress) -> None:
        """One start of ours and of each contender that does not count.

        The interpreter's own files are compiled and cached then, and whatever else a program keeps
        from its first start on a machine.

        Raises:
            PlatformError: Ours fails: no start of this model is possible here.
        """
        if self.cells:
            progress.say("a start that does not count")
            cell = Cell("fresh", "warm", "disk", None, "native", "run")
            self.starter.start(cell, partial(self._prepare, cell))
        for contender in {id(contender): contender for contender, _ in self.rivals}.values():
            progress.say(f"{contender.name}: a start that does not count")
            try:
                contender.start()
            except ColdframeError as error:
                for pair in [pair for pair in self.rivals if pair[0] is contender]:
                    self._leave_rival(pair, error)

    def run(self, rounds: int, progress: Progress) -> None:
        """Runs each cell and each contender so many times.

        Raises:
            KeyboardInterrupt: Before a single round was finished; later that is kept for whoever
                asks, and what the last round has measured is dropped.
        """
        try:
            self._run(rounds, progress)
        except KeyboardInterrupt as error:
            if self.done == 0 or not (self.cells or self.rivals):
                raise
            self.interrupted = error
            self._drop_the_last()

    def _drop_the_last(self) -> None:
        for measured in self.cells:
            del measured.starts[self.done :], measured.ceilings[self.done :]
        for _, rival in self.rivals:
            del rival.outcomes[self.done :], rival.ceilings[self.done :]

    def _run(self, rounds: int, progress: Progress) -> None:
        for number in range(rounds):
            rates: dict[str, float] = {}
            tasks: list[Callable[[], None]] = []
            for measured in self.cells:
                tasks.append(partial(self._start, measured, progress))
            for pair in self.rivals:
                tasks.append(partial(self._rival, pair, progress))
            for way in self._ceilings:
                tasks.append(partial(self._limit, way, rates))
            random.Random(number).shuffle(tasks)
            for task in tasks:
                task()
            self._hold_against(rates)
            self.done += 1

    def _limit(self, way: str, rates: dict[str, float]) -> None:
        try:
            rates[way] = self._ceiling(way)
        except PlatformError as error:
            del self._ceilings[way]
            self.left_out.append({"what": f"the ceiling of {way}", "why": str(error)})
            for measured in self.cells:
                if _way(measured.cell) == way:
                    measured.ceilings.clear()
            for _, rival in self.rivals if way == "disk" else ():
                rival.ceilings.clear()

    def _hold_against(self, rates: dict[str, float]) -> None:
        for measured in self.cells:
            way = _way(measured.cell)
            if way in rates:
                measured.ceilings.append(rates[way])
                measured.ceiling_how = self._ceilings[way]
        for _, rival in self.rivals:
            if rival.cache == "cold" and "disk" in rates:
                rival.ceilings.append(rates["disk"])
                rival.ceiling_how = self._ceilings["disk"]

    def _start(self, measured: Measured, progress: Progress) -> None:
        cell = measured.cell
        try:
            start = self.starter.start(cell, partial(self._rested, cell))
        except PlatformError as error:
            progress.step(cell.id, None)
            self.failed.append(cell.id)
            self._leave(measured, error)
            return
        measured.starts.append(start)
        measured.image_bytes = self._images.get(cell)
        measured.evicted = True if cell.cache == "cold" else None
        progress.step(cell.id, start.ttft_s)

    def _rival(self, pair: tuple[Contender, Rival], progress: Progress) -> None:
        contender, rival = pair
        try:
            self._page_cache(rival.cache, weight_files(self.model))
            time.sleep(self.rest_s)
            outcome = contender.start()
        except ColdframeError as error:
            progress.step(rival.id, None)
            self._leave_rival(pair, error)
            return
        rival.outcomes.append(outcome)
        rival.evicted = True if rival.cache == "cold" else None
        progress.step(rival.id, outcome.ttft_s)

    def _leave_rival(self, pair: tuple[Contender, Rival], error: ColdframeError) -> None:
        self.rivals.remove(pair)
        self.failed.append(pair[1].id)
        self.left_out.append({"what": pair[1].id, "why": _short(error)})

    def _leave(self, measured: Measured, error: PlatformError) -> None:
        self.cells.remove(measured)
        self.lost.append(measured.cell.id)
        self.left_out.append({"what": measured.cell.id, "why": _short(error)})

    def _prepare(self, cell: Cell, conditions: Conditions) -> None:
        """Makes the page cache what the cell wants, and proves it where that is empty."""
        files = weight_files(self.model)
        if conditions.store is not None:
            images = files_in(conditions.store)
            self._images[cell] = sum(path.stat().st_size for path in images)
            files += images
        self._page_cache(cell.cache, files)

    def _rested(self, cell: Cell, conditions: Conditions) -> None:
        """Prepares a start as it is after a time at zero."""
        self._prepare(cell, conditions)
        if not cell.rests:
            time.sleep(self.rest_s)

    def _page_cache(self, cache: str, files: Sequence[Path]) -> None:
        if cache == "cold":
            evict_files(files)
        else:
            read_s(files)

    def _ceiling(self, way: str) -> float:
        with self.sources.place(way) as place:
            if way != "disk":
                read_s(weight_files(self.model))
            return ceiling_rate(place, self.model)

    def _may_be_predicted(self, cell: Cell) -> bool:
        """Whether a plan says anything of a cell; why not is in `left_out` else."""
        why = unpredicted(cell)
        if why is not None:
            self.left_out.append({"what": f"the prediction of {cell.id}", "why": why})
        return why is None

    def _plan(self, cell: Cell, conditions: Conditions) -> dict[str, Any]:
        """One plan for all cells under the same conditions."""
        key = (conditions.uri, cell.throttle, tuple(sorted(conditions.environment.items())))
        if key not in self._plans:
            self._plans[key] = plan_of(
                conditions.uri,
                cell,
                conditions.environment,
                self.prompt,
                self.tokens,
                self.rehearsals,
                self.rest_s,
            )
        return self._plans[key]


def _short(error: ColdframeError) -> str:
    """An error on a line: what a server has said to its end is in it, too."""
    said = " ".join(str(error).split())
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


def _way(cell: Cell) -> str | None:
    """The path whose own limit a cell is held against; None where nothing is moved."""
    if cell.rests or (cell.source == "disk" and cell.cache == "warm"):
        return None
    return "http" if cell.source == "s3" else cell.source
