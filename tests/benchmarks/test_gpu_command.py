"""`coldframe bench gpu` from its arguments to its results, with parts in the place of a GPU's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.benchmarks.gpu import command
from coldframe.benchmarks.gpu.budget import Part
from coldframe.benchmarks.gpu.document import read
from coldframe.benchmarks.gpu.machine import FINGERPRINT
from coldframe.benchmarks.gpu.model import DIRECTORY
from coldframe.benchmarks.gpu.table import sections
from coldframe.loader.errors import PlatformError
from coldframe.runtime.flags.parser import Parser
from tests.benchmarks.test_gpu_document import MACHINE

SOON = 60.0

Bench = Callable[..., int]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs the command, with a machine and one part that consist of the given code."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    (tmp_path / "scratch").mkdir()
    machine, part = (Part(name, name, name, SOON, 1.0) for name in ("machine", "rates"))
    monkeypatch.setattr(command, "MACHINE", machine)
    monkeypatch.setattr(command, "PARTS", (part,))

    def run(code: str, *arguments: str, gpu: str | None = None) -> int:
        for name, body in (
            ("machine", gpu or f"report.keep({FINGERPRINT!r}, {MACHINE})"),
            ("rates", code),
        ):
            (modules / f"{name}.py").write_text(
                "from coldframe.benchmarks.gpu.report import *\n"
                "from coldframe.benchmarks.harness import Row\n"
                f"def measure(report, setting):\n    {body}\n"
            )
        parser = Parser()
        command.add_arguments(parser)
        where = {name: f"{tmp_path}/{name}" for name in ("results", "scratch", "output")}
        told = [word for name, path in where.items() for word in (f"--{name}", path)]
        return command.run(parser.parse([*told, *arguments]))

    return run


def result(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "results").iterdir()
    return file


def test_what_is_found_is_written_printed_and_logged(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "LOG.md"
    log.write_text("# Log\n\n## 2026-11-01: older\n")
    code = 'report.figure(Row("rate", [2.0], "GB/s", 1.0, True))'
    assert bench(code, "--log", str(log)) == 0
    document = read(result(tmp_path))
    assert document["fingerprint"] == MACHINE
    (part,) = document["parts"]
    assert (part["name"], part["status"], part["rows"][0]["met"]) == ("rates", "done", True)
    told = capsys.readouterr()
    assert "| rate | 2 | 2 | 2 | GB/s | at least 1 | met |" in told.out
    assert "rates: done in" in told.err
    (logged,) = sections(log.read_text()).values()
    assert logged.strip() == told.out.strip()
    assert list((tmp_path / "scratch").iterdir()) == []
    log.write_text("# Log\n\n## 2026-11-01: older\n")
    assert bench("", "--from", str(result(tmp_path)), "--log", str(log)) == 0
    assert list(sections(log.read_text())) == [result(tmp_path).name]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            'report.figure(Row("rate", [0.5], "GB/s", 1.0, True))', marks=pytest.mark.heavy
        ),
        pytest.param('report.check(Check("right", "failed", "wrong"))', marks=pytest.mark.heavy),
        'print("some words"); raise ValueError("no")',
    ],
)
def test_what_fails_or_misses_its_aim_shows_in_the_status(
    bench: Bench, tmp_path: Path, code: str
) -> None:
    assert bench(code) == 1
    assert len(read(result(tmp_path))["parts"]) == 1
    printed = (tmp_path / "output").read_text()
    assert printed.startswith("== machine: done\n== rates: ")
    if "words" in code:
        assert "some words" in printed
        assert "Traceback" in printed


def test_what_is_left_out_is_said_and_is_no_failure(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench('report.left_out("disk", "there is none"); raise LeftOut("no room")') == 0
    told = capsys.readouterr().err
    assert "s: no room\n  left out: disk: there is none" in told


@pytest.mark.heavy
def test_a_model_that_a_part_has_made_goes_with_the_run(bench: Bench, tmp_path: Path) -> None:
    model = tmp_path / "made"
    code = f'import os; os.mkdir("{model}"); report.keep({DIRECTORY!r}, "{model}"); os._exit(5)'
    assert bench(code) == 1
    assert not model.exists()


@pytest.mark.heavy
def test_parts_find_their_places_in_the_environment(bench: Bench, tmp_path: Path) -> None:
    names = ["COLDFRAME_RUN_DIR", "TMPDIR", "COLDFRAME_SNAPSHOT"]
    before = dict(os.environ)
    code = f"import os; report.answer('found', [os.environ[name] for name in {names}])"
    assert bench(code) == 0
    assert dict(os.environ) == before
    runs, temporary, snapshot = read(result(tmp_path))["parts"][0]["answers"]["found"]
    assert runs == temporary
    assert Path(runs).parent == tmp_path / "scratch"
    assert snapshot == "off"


def test_no_gpu_is_no_error(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("", gpu="raise LeftOut('none is here')") == 0
    assert not (tmp_path / "results").exists()
    assert capsys.readouterr().out == (
        "There is no GPU to measure, and so no results: none is here\n"
    )


@pytest.mark.heavy
def test_a_gpu_that_does_not_work_is_an_error_and_so_is_none_that_is_required(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("", "--require", gpu="raise LeftOut('none is here')") == 3
    assert bench("", gpu="raise ValueError('it is broken')") == 1
    assert "cannot be used, and so there are no results: ValueError" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


@pytest.mark.heavy
def test_a_machine_that_says_too_little_makes_no_results(bench: Bench, tmp_path: Path) -> None:
    little = json.dumps({"gpu": "some"})
    with pytest.raises(PlatformError, match=r"fingerprint\.cuda is missing"):
        bench("pass", gpu=f"report.keep({FINGERPRINT!r}, {little})")
    assert list((tmp_path / "scratch").iterdir()) == []
