"""Workers take as many threads as the container has processors, and sleep when there is no work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.helpers import ask, finish, prompt_of
from tests.support import unavailable

Make = Callable[..., Path]
OWN_THREADS = 4
"""A worker's threads without those of its kernels: the main one, a reader for each socket, and the
one that enters pages."""

# Joins a group, then answers one request and tells what its workers are.
IN_A_GROUP = """
import json, os, sys
from pathlib import Path
Path(sys.argv[3], "cgroup.procs").write_text(str(os.getpid()))
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica.replica import Replica
from tests.runtime.helpers import ask, finish, prompt_of
with Replica(ReplicaOptions(model=sys.argv[1], run_dir=sys.argv[2])) as replica:
    finish(replica, ask(replica, prompt_of(300), 20))
    workers = {}
    for name, pid in replica.pids.items():
        if name == "memory":
            continue
        environ = Path(f"/proc/{pid}/environ").read_text().split(chr(0))
        threads = len(os.listdir(f"/proc/{pid}/task"))
        workers[name] = [threads, dict(e.split("=", 1) for e in environ if "=" in e)]
print(json.dumps(workers))
"""


@pytest.fixture
def one_cpu() -> Iterator[Path]:
    """A cgroup whose processes get as much time as one processor has."""
    v1 = Path("/sys/fs/cgroup/cpu")
    parent = v1 if v1.is_dir() else Path("/sys/fs/cgroup")
    group = parent / f"coldframe-threads-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        unavailable(f"no cgroup can be made here: {error}")
    try:
        if v1.is_dir():
            (group / "cpu.cfs_quota_us").write_text("100000")
        else:
            (group / "cpu.max").write_text("100000 100000")
        yield group
    except OSError as error:
        unavailable(f"no quota can be set here: {error}")
    finally:
        group.rmdir()


@pytest.fixture
def replica(demo_model: Make, no_leaks: Path) -> Iterator[Replica]:
    """One whose workers have two threads each, and have used them."""
    options = ReplicaOptions(model=str(demo_model("llama")), run_dir=str(no_leaks), threads=2)
    with Replica(options) as replica:
        finish(replica, ask(replica, prompt_of(300), 20))
        yield replica


def test_threads_follow_the_quota(demo_model: Make, no_leaks: Path, one_cpu: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_GROUP, str(demo_model("llama")), str(no_leaks), str(one_cpu)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    workers: dict[str, Any] = json.loads(done.stdout)
    assert set(workers) == {"prefill-0", "decode-1"}
    for threads, environ in workers.values():
        assert environ["OMP_NUM_THREADS"] == environ["MKL_NUM_THREADS"] == "1"
        assert environ["OMP_WAIT_POLICY"] == "PASSIVE"
        assert threads == OWN_THREADS


def test_threads_can_be_asked_for(replica: Replica) -> None:
    pid = next(pid for name, pid in replica.pids.items() if name.startswith("prefill"))
    environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
    assert "OMP_NUM_THREADS=2" in environ
    assert psutil.Process(pid).num_threads() > OWN_THREADS


@pytest.mark.heavy
def test_an_idle_replica_sleeps(replica: Replica) -> None:
    processes = [psutil.Process(pid) for pid in replica.pids.values()]

    def used() -> float:
        times = [process.cpu_times() for process in processes]
        return sum(time.user + time.system for time in times)

    before, started = used(), time.monotonic()
    while time.monotonic() < started + 0.6:
        replica.poll(0.6)
    # One thread that spins would have used all of it.
    assert used() - before < 0.1
