"""Memory of a tree of processes, held against what the kernel says of each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from coldframe.benchmarks.memory import replica_pss
from coldframe.loader.errors import PlatformError

SIZE = 64 << 20
TREE = f"""
import mmap, os, sys, time
shared = mmap.mmap(-1, {SIZE})
for at in range(0, {SIZE}, 4096):
    shared[at] = 1
for _ in range(2):
    if os.fork() == 0:
        sum(shared[at] for at in range(0, {SIZE}, 4096))
        if os.fork() == 0:
            sum(shared[at] for at in range(0, {SIZE}, 4096))
        break
os.write(1, b"up\\n")
time.sleep(120)
"""


@pytest.fixture
def tree() -> Iterator[subprocess.Popen[str]]:
    """Five processes that have some memory in common, and little else."""
    with subprocess.Popen([sys.executable, "-S", "-c", TREE], stdout=-1, text=True) as process:
        try:
            assert process.stdout is not None
            assert [process.stdout.readline() for _ in range(5)] == ["up\n"] * 5
            yield process
        finally:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def test_what_is_shared_counts_once(tree: subprocess.Popen[str]) -> None:
    found = replica_pss(tree.pid)
    assert SIZE < found < SIZE + (60 << 20)
    rss = [p.memory_info().rss for p in psutil.Process(tree.pid).children(recursive=True)]
    assert len(rss) == 4
    assert sum(rss) > 4 * SIZE


def test_one_that_is_elsewhere_is_added(tree: subprocess.Popen[str]) -> None:
    first, *_ = psutil.Process(tree.pid).children()
    half = replica_pss(first.pid)
    assert replica_pss(first.pid, tree.pid) > half + SIZE // 8
    assert replica_pss(first.pid, first.pid) == pytest.approx(half, rel=0.01)  # and counted once


def test_one_that_is_gone(tree: subprocess.Popen[str]) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as ended:
        ended.wait()
    assert replica_pss(tree.pid, ended.pid) > SIZE
    with pytest.raises(PlatformError, match="no such process"):
        replica_pss(ended.pid)
