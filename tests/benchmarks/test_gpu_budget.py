"""The parts of `make gpu`: what they find is kept, however they end, and none outstays its time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks.gpu.budget import Outcome, Part, run_parts
from coldframe.benchmarks.gpu.parts import BUDGET_S, MACHINE, PARTS
from coldframe.benchmarks.gpu.probes import Probe, ask_all
from coldframe.benchmarks.gpu.report import Check, Found, LeftOut, Report, Setting
from coldframe.benchmarks.harness import Row
from tests.runtime.snapshots import eventually

ROOT = Path(__file__).parent.parent.parent
SOON = 60.0

Run = Callable[..., list[Outcome]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs parts that consist of the given code."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def go(
        *parts: str,
        seconds: float = SOON,
        least: tuple[float, ...] = (),
        budget: float = 600.0,
        go_on: bool = True,
    ) -> list[Outcome]:
        made = []
        for number, code in enumerate(parts):
            lines = "\n".join(f"    {line}" for line in code.strip().splitlines())
            body = (
                "import os, signal, subprocess, sys, time\n"
                "from coldframe.benchmarks.gpu.report import Check, LeftOut\n"
                "from coldframe.benchmarks.harness import Row\n"
                f"def measure(report, setting):\n{lines}\n"
            )
            (tmp_path / f"part_{number}.py").write_text(body)
            enough = least[number] if number < len(least) else 1.0
            made.append(Part(f"p{number}", "a part", f"part_{number}", seconds, enough))
        setting = Setting("cuda:0", str(tmp_path), 0.0)
        return run_parts(made, setting, budget, lambda _: go_on)

    return go


def test_what_parts_find_is_read_and_told_to_later_ones(run: Run) -> None:
    first, second = run(
        """
report.figure(Row("rate", [1.0, 3.0, 2.0], "GB/s", 1.5, True))
report.check(Check("right", "passed"))
report.answer("which", {"one": 1})
report.keep("place", "/x")
report.left_out("the rest", "there is none")
""",
        """
report.figure(Row("again", [report.earlier.median("rate")], report.earlier.need("place")))
report.earlier.median("nobody's")
""",
    )
    assert (first.status, first.reason) == ("done", None)
    assert first.found == Found(
        [Row("rate", [1.0, 3.0, 2.0], "GB/s", 1.5, True)],
        {"which": {"one": 1}},
        {"the rest": "there is none"},
        [Check("right", "passed")],
        {"place": "/x"},
    )
    assert second.found.rows == [Row("again", [2.0], "/x")]
    assert second.status == "left out"
    assert second.reason == "nothing to compare with: there is no figure 'nobody's'"


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ('raise LeftOut("no such machine")', "left out", "no such machine"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", "ended by SIGKILL"),
        pytest.param(
            'from coldframe.loader.errors import DeviceFull\nraise DeviceFull("it is full")',
            "failed",
            "it is full",
            marks=pytest.mark.heavy,
        ),
        pytest.param(
            "raise ZeroDivisionError('by zero')",
            "failed",
            "ZeroDivisionError: by zero",
            marks=pytest.mark.heavy,
        ),
    ],
)
def test_each_ending_has_its_reason_and_keeps_what_was_found(
    run: Run, code: str, status: str, reason: str
) -> None:
    (outcome,) = run(f'report.figure(Row("kept", [1.0], "s"))\n{code}')
    assert outcome.status == status
    assert outcome.found.rows == [Row("kept", [1.0], "s")]
    assert (outcome.reason or "").startswith(reason)


@pytest.mark.parametrize("group", [None, 0])
def test_a_part_that_hangs_is_ended_with_what_it_has_started(
    run: Run, tmp_path: Path, group: int | None
) -> None:
    hangs = f"""
sleeps = [sys.executable, "-c", "import time; time.sleep(1000)"]
child = subprocess.Popen(sleeps, process_group={group})
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(1000)
"""
    (outcome,) = run(hangs, seconds=0.3)
    assert (outcome.status, outcome.reason) == ("out of time", "it was not done within 0.3 s")
    child = tmp_path / "child"
    # On a busy machine it may have been ended before it came to that.
    if child.exists() and child.read_text():
        eventually(lambda: not runs(int(child.read_text())))


def runs(pid: int) -> bool:
    """Whether a process is there, and not only waiting to be reaped."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def test_what_does_not_fit_the_budget_is_not_begun(run: Run) -> None:
    too_long, fits = run("pass", "pass", least=(1000.0, 1.0), budget=100.0)
    assert fits.status == "done"
    assert too_long.status == "left out"
    assert "s of the budget are left, and it takes 1000 s at least" in (too_long.reason or "")


@pytest.mark.heavy
def test_nothing_follows_where_there_is_no_going_on(run: Run) -> None:
    assert len(run("pass", "pass", go_on=False)) == 1


def test_a_line_that_was_cut_off_is_no_line(tmp_path: Path) -> None:
    file = tmp_path / "f"
    report = Report(file)
    report.answer("whole", 1)
    report.close()
    file.write_bytes(file.read_bytes() + b'["answer", "cut')
    assert Found.read(file).answers == {"whole": 1}
    assert Found.read(tmp_path / "none") == Found()
    with pytest.raises(LeftOut, match="what it needs is missing: place"):
        Found().need("place")


def test_a_figure_told_again_takes_its_own_place(tmp_path: Path) -> None:
    report = Report(tmp_path / "f")
    for runs in ([1.0], [1.0, 2.0]):
        report.figure(Row("rate", runs, "GB/s"))
        report.figure(Row("share", [run / 4 for run in runs], "ratio"))
    report.close()
    rows = Found.read(tmp_path / "f").rows
    assert rows == [Row("rate", [1.0, 2.0], "GB/s"), Row("share", [0.25, 0.5], "ratio")]


def test_all_parts_fit_the_budget_and_come_behind_what_they_need() -> None:
    *others, restored, probes, sanitizer = PARTS
    assert (restored.name, probes.name, sanitizer.name) == ("restored", "probes", "sanitizer")
    longest = MACHINE.seconds + sum(part.seconds for part in others)
    # Whoever is ended has five seconds to clear up, and behind the last one a model is removed.
    assert longest + probes.least <= BUDGET_S <= 560 - 15
    assert all(part.least <= part.seconds for part in PARTS)
    names = [part.name for part in PARTS]
    assert names[:2] == ["correctness", "returning"]
    assert names.index("copies") < names.index("model") < names.index("loads")
    assert names.index("model") < min(map(names.index, ("resident", "cold", "decode", "archive")))
    assert names.index("copies") < names.index("resident")


def test_a_question_without_an_answer_keeps_no_other_from_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "asked.py").write_text(
        "def good(ordinal): return {'of': ordinal}\n"
        "def bad(ordinal): raise ValueError('nobody knows')\n"
    )
    report = Report(tmp_path / "f")
    probes = (
        Probe("bad?", "bad", SOON, module="asked"),
        Probe("good?", "good", SOON, module="asked"),
    )
    ask_all(report, Setting("cuda:3", str(tmp_path), 600.0), probes)
    report.close()
    found = Found.read(tmp_path / "f")
    assert found.answers == {"good?": {"of": 3}}
    assert found.left_out == {"bad?": "exit status 1: ValueError: nobody knows"}


@pytest.mark.heavy
def test_a_question_that_hangs_or_dies_keeps_no_other_from_being_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "asked.py").write_text(
        "import os, time\n"
        "def hangs(ordinal): time.sleep(1000)\n"
        "def dies(ordinal): os._exit(9)\n"
        "def times(ordinal): return {'first': 0.5}\n"
    )
    report = Report(tmp_path / "f")
    probes = (
        Probe("hangs?", "hangs", 0.3, module="asked"),
        Probe("dies?", "dies", SOON, module="asked"),
        Probe("times", "times", SOON, times=2, module="asked"),
    )
    ask_all(report, Setting("cuda:3", str(tmp_path), 600.0), probes)
    report.close()
    found = Found.read(tmp_path / "f")
    assert found.rows == [Row("times: first", [0.5, 0.5], "s")]
    assert found.left_out["hangs?"] == "no answer within 0.3 s"
    assert found.left_out["dies?"] == "exit status 9: without a word"


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "coldframe.benchmarks.gpu", *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    results, scratch = tmp_path / "results", tmp_path / "scratch"
    scratch.mkdir()
    where = ("--results", str(results), "--scratch", str(scratch), "--output", f"{tmp_path}/o")
    done = gpu(*where)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("There is no GPU to measure, and so no results: ")
    assert not results.exists()
    assert list(scratch.iterdir()) == []


@pytest.mark.heavy
def test_a_part_that_there_is_not_is_refused() -> None:
    done = gpu("--only", "copies,nothing")
    assert done.returncode == 1
    assert "there is no such part" in done.stderr
