"""The tests of `tests/gpu`, by pytest; each is a check of the report, as soon as it has ended.

In two parts: what comes back, from being captured, checkpointed or in an image, may cost a GPU its
context, and is not to cost all the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coldframe.benchmarks.gpu.report import Check, LeftOut, Report, Setting

if TYPE_CHECKING:
    import pytest

__all__ = ["Recorder", "RETURNING", "files_of", "measure", "measure_returning", "run_tests"]

_ROOT = Path(__file__).resolve().parent.parent.parent
_LONGEST = 200
_HANGS_S = 45.0
_QUICK = "test_memory"

RETURNING = ("test_graphs.py", "test_checkpoints.py", "test_images.py")
"""The files about what comes back."""


def measure(report: Report, setting: Setting) -> None:
    """Runs the tests, but for those of what comes back.

    Raises:
        LeftOut: There are none: they are in a checkout, and not in what is installed.
        RuntimeError: pytest itself failed.
    """
    run_tests(report, setting, files_of(returning=False))


def measure_returning(report: Report, setting: Setting) -> None:
    """Runs those; see `measure`."""
    run_tests(report, setting, files_of(returning=True))


def files_of(*, returning: bool) -> list[Path]:
    """The tests' files: of what comes back, or all others."""
    files = sorted((_ROOT / "tests" / "gpu").glob("test_*.py"))
    return [file for file in files if (file.name in RETURNING) == returning]


def run_tests(report: Report, setting: Setting, tests: Sequence[Path]) -> None:
    """See `measure`.

    Args:
        report: Where it goes.
        setting: The GPU, which the tests find in their environment.
        tests: Their files.
    """
    import pytest

    if not tests:
        raise LeftOut(f"there are no tests in {_ROOT}")
    os.environ["COLDFRAME_TEST_DEVICE"] = setting.device
    # For pytest-timeout, where it is installed: one test that hangs is not to cost all the others.
    os.environ.setdefault("PYTEST_TIMEOUT", f"{_HANGS_S:.0f}")
    recorder = Recorder(report)
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        f"{setting.scratch}/t",
        *map(str, tests),
    ]
    status = pytest.main(arguments, plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not recorder.count:
        raise RuntimeError(f"pytest ended with status {int(status)} after {recorder.count} tests")


class Recorder:
    """A plugin of pytest that reports each test when it has ended.

    Attributes:
        count: How many there were.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self.count = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # What needs no replica takes no time, and is known also of a run that is cut off.
        items.sort(key=lambda item: item.path.stem != _QUICK)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that passed and then cannot clean up has failed; one that is skipped never begins.
        if report.when != "call" and report.passed:
            return
        self.count += 1
        name = report.nodeid.rpartition("/")[2]
        if report.passed:
            self._report.check(Check(name, "passed"))
        else:
            self._report.check(Check(name, report.outcome, _reason(report)))


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        told = report.longrepr[2].removeprefix("Skipped: ")
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        told = report.longreprtext if crash is None else crash.message
    told = " ".join(told.split()) or "without a word"
    # What failed is said first, why often last.
    return told if len(told) <= 2 * _LONGEST else f"{told[:_LONGEST]} ... {told[-_LONGEST:]}"
