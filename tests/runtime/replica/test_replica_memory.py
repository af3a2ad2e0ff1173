"""The memory of processes together, against what another counts."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from coldframe.runtime.replica.replica_memory import pss_of

HOLD = """
import subprocess, sys
held = bytearray(b"x" * (int(sys.argv[1]) << 20))
if len(sys.argv) > 2:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2], "20"], stdout=subprocess.PIPE)
    child.stdout.readline()
print("held", flush=True)
sys.stdin.read()
"""


def test_all_that_processes_have_is_counted_once() -> None:
    command = [sys.executable, "-c", HOLD, "30", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
        told = sum(each.memory_full_info().pss for each in processes)
        found = pss_of(process.pid)
        # Also where one of them is named besides.
        again = pss_of(process.pid, [each.pid for each in processes])
        process.communicate()
    assert len(processes) == 2
    assert found is not None
    assert found > 50 << 20
    assert found == pytest.approx(told, rel=0.05)
    assert again == pytest.approx(found, rel=0.05)
    # Who has ended has none.
    assert pss_of(process.pid) == 0
    assert pss_of(os.getpid(), [process.pid]) != 0
