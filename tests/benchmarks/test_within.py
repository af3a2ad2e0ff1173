"""Programs that are given so much time and no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coldframe.benchmarks.within import run_within
from tests.benchmarks.test_gpu_budget import runs
from tests.runtime.snapshots import eventually


def test_what_it_says_and_how_it_ends() -> None:
    code = "import os, sys; print(os.environ['A']); print('b', file=sys.stderr); sys.exit(3)"
    done = run_within([sys.executable, "-c", code], 60, {**os.environ, "A": "a"})
    assert (done.returncode, done.stdout, done.stderr) == (3, "a\n", "b\n")


def test_who_is_late_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    # The shell is there at once, and its child has what it prints to, too.
    script = f"sleep 1000 & echo $! > {tmp_path}/child; mv {tmp_path}/child {tmp_path}/pid; wait"
    with pytest.raises(subprocess.TimeoutExpired):
        run_within(["/bin/sh", "-c", script], 0.5)
    file = tmp_path / "pid"
    # On a busy machine it may have been ended before it came to that.
    if file.exists():
        eventually(lambda: not runs(int(file.read_text())))
