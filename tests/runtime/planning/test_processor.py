"""Processor time of processes, and files in the page cache and out of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from coldframe.loader.cgroup import cpu_count
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.runtime.planning.processor import (
    busy_processors,
    drop_files,
    idle_s,
    load_files,
    processor_s,
)

SPIN = """
import subprocess, sys, time
def spin(seconds):
    while time.process_time() < seconds: pass
spin(0.3)
if len(sys.argv) > 1:
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.4: pass"])
    child = subprocess.Popen([sys.executable, sys.argv[1]], stdout=subprocess.PIPE)
    child.stdout.readline()
print("spun", flush=True)
time.sleep(600)
"""


def test_the_time_of_a_process_and_of_all_below_it(tmp_path: Path) -> None:
    script = tmp_path / "spin.py"
    script.write_text(SPIN)
    command = [sys.executable, script, script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            found = processor_s(process.pid)
            child = psutil.Process(process.pid).children()
            times = [each.cpu_times() for each in (psutil.Process(process.pid), *child)]
            told = sum(t.user + t.system + t.children_user + t.children_system for t in times)
            # Where others have been idle for long enough, it is what this one has run itself.
            seconds = 10.0
            alone = busy_processors(process.pid, seconds, idle_s() - cpu_count() * seconds)
            assert alone == pytest.approx(found / seconds, abs=0.05)
            # And where nobody was idle all of them were busy.
            assert busy_processors(process.pid, seconds, idle_s()) >= cpu_count() - 0.5
            # Itself, one that has ended, and one that is there.
            assert found >= 0.3 + 0.4 + 0.3 - 0.1
            assert found == pytest.approx(told, abs=0.1)
        finally:
            for each in psutil.Process(process.pid).children():
                each.kill()
            process.kill()
    assert processor_s(process.pid) == 0


def test_files_are_had_by_the_page_cache_and_dropped(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    with file.open("rb") as opened:
        load_files([str(file)])
        assert cached_bytes(opened.fileno(), 0, 1 << 20) == 1 << 20
        drop_files([str(file)])  # a tmpfs keeps them
        assert cached_bytes(opened.fileno(), 0, 1 << 20) <= 1 << 20
    load_files([str(file)])
    assert file.read_bytes() == bytes(1 << 20)
