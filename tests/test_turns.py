"""Tests in several processes: which of them run at once, where their files are, and Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.runtime.snapshots import eventually

ROOT = Path(__file__).parent.parent

# Goes in when its turn has come, and stays until a line comes.
ONE = """
import os, sys
from pathlib import Path
from tests.turns import Turns
folder, name, how = sys.argv[1:]
def note(what):
    fd = os.open(f"{folder}/notes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{name} {what}\\n".encode())
with Turns(Path(folder)).turn(alone=how == "alone"):
    note("in")
    print("in", flush=True)
    sys.stdin.readline()
    note("out")
"""


@contextmanager
def one(folder: Path, name: str, how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has a test to run."""
    with subprocess.Popen(
        [sys.executable, "-c", ONE, str(folder), name, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def comes_in(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "in\n"


def leaves(process: subprocess.Popen[str]) -> None:
    process.communicate("\n")
    assert process.returncode == 0


def somebody_waits(folder: Path) -> bool:
    """Whether somebody stands in the door."""
    with (folder / "door").open("a") as door:
        try:
            fcntl.lockf(door, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_some_are_beside_one_another_and_some_alone(tmp_path: Path) -> None:
    with one(tmp_path, "a", "beside") as a, one(tmp_path, "b", "beside") as b:
        assert comes_in(a)
        assert comes_in(b)
        with one(tmp_path, "c", "alone") as c:
            eventually(lambda: somebody_waits(tmp_path))
            with one(tmp_path, "d", "beside") as d:
                leaves(a)
                leaves(b)
                assert comes_in(c)
                leaves(c)
                assert comes_in(d)  # who came later waited, although a and b were only beside it
                leaves(d)
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes[-4:] == ["c in", "c out", "d in", "d out"]


def test_who_is_killed_keeps_nobody_out(tmp_path: Path) -> None:
    with one(tmp_path, "a", "alone") as a:
        assert comes_in(a)
        with one(tmp_path, "b", "alone") as b:
            a.kill()
            assert comes_in(b)
            leaves(b)


TESTS = """
import os, subprocess, time
from pathlib import Path
import pytest

def note(what):
    fd = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, (what + "\\n").encode())
    os.close(fd)

@pytest.mark.parametrize("number", range(12))
def test_beside(number, tmp_path):
    note(f"beside {tmp_path}")
    time.sleep(0.02)
    note("out")

@pytest.mark.alone
@pytest.mark.parametrize("number", range(4))
def test_alone(number):
    note("alone")
    time.sleep(0.02)
    note("out")

@pytest.fixture
def child():
    process = subprocess.Popen(["sleep", "1000"])
    yield process.pid
    process.kill()
    process.wait()

@pytest.mark.heavy
@pytest.mark.parametrize("number", range(2))
def test_for_ever(number, child):
    note(str(child))
    time.sleep(1000)
"""


@contextmanager
def some_run(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`make test` over a few tests, whose files are in a folder, and what they noted, too."""
    (folder / "test_some.py").write_text(TESTS)
    with subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"),
            *("-c", str(ROOT / "pyproject.toml"), "--basetemp", str(folder / "t")),
            *("-n", "2", "--dist", "worksteal", *arguments, str(folder)),
        ],
        cwd=ROOT,
        env={**os.environ, "NOTES": str(folder / "notes")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.heavy
def test_a_whole_run(tmp_path: Path) -> None:
    with some_run(tmp_path) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert "16 passed" in said
    notes = (tmp_path / "notes").read_text().splitlines()
    alone = [at for at, what in enumerate(notes) if what == "alone"]
    assert len(alone) == 4
    assert {notes[at + 1] for at in alone} == {"out"}
    inside = 0
    for what in notes:
        assert what != "alone" or inside == 0
        inside += -1 if what == "out" else 1
    folders = {Path(what.split()[1]).parent for what in notes if what.startswith("beside")}
    assert folders == {tmp_path / "t" / "0", tmp_path / "t" / "1"}


@pytest.mark.heavy
@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_ends_all_of_it(tmp_path: Path, to_all: bool) -> None:
    with some_run(tmp_path, "-m", "heavy") as process:
        notes = tmp_path / "notes"
        eventually(lambda: notes.exists() and len(notes.read_text().split()) == 2, 60)
        started = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        said, _ = process.communicate()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, said
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
    assert {int(word) for word in notes.read_text().split()} <= {each.pid for each in started}
