"""Rounds with programs that fail or are interrupted, and replicas that die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks.cold.contender import Contender, Outcome
from coldframe.benchmarks.cold.matrix import Cell
from coldframe.benchmarks.cold.prediction import NoPlan, plan_of
from coldframe.benchmarks.cold.progress import Progress
from coldframe.benchmarks.cold.rounds import Rounds
from coldframe.benchmarks.cold.sources import Sources
from coldframe.benchmarks.cold.standby import Engine, Standby, Template
from coldframe.benchmarks.cold.starts import Starter
from coldframe.benchmarks.cold.summary import Measured, Rival
from coldframe.benchmarks.interruption import Terminated, terminable
from coldframe.loader.errors import PlatformError

FRESH = Cell("fresh", "warm", "disk", None, "native", "http")


class Program:
    """Another program that does what it is told to in its starts, one after the other."""

    through = "run"

    def __init__(self, name: str, *starts: Callable[[], None]) -> None:
        self.name = name
        self.started = 0
        self._starts = starts

    def start(self) -> Outcome:
        self.started += 1
        if self.started <= len(self._starts):
            self._starts[self.started - 1]()
        return Outcome(float(self.started), self.started + 1.0, (1,), None)


def fine() -> None:
    pass


def broken() -> None:
    raise PlatformError("it is broken")


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def rounds_of(model: Path, scratch: Path, *programs: Contender) -> Rounds:
    sources = Sources(model, scratch)
    standby = Standby(model, scratch / "images", scratch / "t", Engine(None, 1))
    rivals = [(program, Rival(program.name, "run", "warm", 1)) for program in programs]
    starter = Starter(sources, standby, scratch, [5, 6, 7], 2, set())
    return Rounds(model, sources, starter, 3, 2, [], rivals, [])


def test_the_first_start_of_a_program_does_not_count(tmp_path: Path) -> None:
    program = Program("one")
    rounds = rounds_of(tmp_path, tmp_path, program)
    with Progress() as progress:
        rounds.warm_up(progress)
        rounds.run(2, progress)
    ((_, rival),) = rounds.rivals
    assert [outcome.ttft_s for outcome in rival.outcomes] == [2.0, 3.0]
    assert (rounds.done, rounds.failed, rounds.interrupted) == (2, [], None)


def test_a_program_that_fails_has_failed_and_the_others_go_on(tmp_path: Path) -> None:
    programs = Program("at once", broken), Program("later", fine, fine, broken), Program("never")
    rounds = rounds_of(tmp_path, tmp_path, *programs)
    with Progress() as progress:
        rounds.warm_up(progress)
        rounds.run(3, progress)
    assert rounds.failed == ["at once/warm/disk/run", "later/warm/disk/run"]
    assert [each["what"] for each in rounds.left_out] == rounds.failed
    assert [len(rival.outcomes) for _, rival in rounds.rivals] == [3]


def test_who_interrupts_keeps_the_rounds_that_were_finished(tmp_path: Path) -> None:
    programs = Program("one"), Program("two", fine, fine, fine, interrupted), Program("three")
    rounds = rounds_of(tmp_path, tmp_path, *programs)
    with terminable(), Progress() as progress:
        rounds.warm_up(progress)
        rounds.run(7, progress)
    assert rounds.done == 2
    assert isinstance(rounds.interrupted, Terminated)
    assert [len(rival.outcomes) for _, rival in rounds.rivals] == [2, 2, 2]


def test_who_interrupts_the_first_round_has_nothing_to_keep(tmp_path: Path) -> None:
    rounds = rounds_of(tmp_path, tmp_path, Program("one", fine, interrupted))
    with Progress() as progress:
        rounds.warm_up(progress)
        with pytest.raises(Terminated), terminable():
            rounds.run(7, progress)


def test_a_replica_that_dies_is_not_waited_for(
    no_leaks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_PLATFORM", "there is none such")  # it ends before it listens
    sources = Sources(tmp_path, no_leaks)
    with pytest.raises(PlatformError, match="a server has ended"), sources.place("peer"):
        pass
    standby = Standby(tmp_path, tmp_path / "images", no_leaks / "t", Engine(None, 1))
    starter = Starter(sources, standby, no_leaks, [5, 6, 7], 2, set())
    with pytest.raises(PlatformError, match="a server has ended"):
        starter.start(FRESH, lambda _: None)


def test_a_template_that_has_ended_has_no_forks(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with pytest.raises(PlatformError, match="a template has ended"):
        Template(tmp_path, pid).forks()


def test_a_cell_without_a_plan_is_measured_and_the_others_are_asked_for_theirs(
    own_model: Callable[..., Path], no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = own_model()
    with pytest.raises(NoPlan, match="a plan cannot be made"):
        plan_of(str(model / "none"), FRESH, {}, 3, 2)
    rounds = rounds_of(model, no_leaks)
    rounds.cells = [Measured(FRESH, 1), Measured(Cell(*("fresh", "warm", "disk", 1e9), *TAIL), 1)]
    asked = []

    def once(uri: str, cell: Cell, *rest: object) -> dict[str, object]:
        asked.append(cell)
        if len(asked) == 1:
            raise NoPlan("a plan cannot be made")
        return {"starts": []}

    monkeypatch.setattr("coldframe.benchmarks.cold.rounds.plan_of", once)
    with Progress() as progress:
        rounds.check(progress)
    assert [measured.plan for measured in rounds.cells] == [None, {"starts": []}]
    assert [each["what"] for each in rounds.left_out] == [f"the prediction of {FRESH.id}"]


TAIL = ("native", "http")
