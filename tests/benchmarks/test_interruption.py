"""How benchmarks end by a signal: in order, once, and with all that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from coldframe.benchmarks.interruption import Terminated, end, guarded, terminable, unbroken
from tests.runtime.snapshots import eventually

OURS = """
import subprocess, sys, time
from coldframe.benchmarks.interruption import guarded
with guarded() as watch:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    watch(-child.pid)
    print(child.pid, flush=True)
    time.sleep(1000)
"""


def _ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_the_first_signal_ends_it_and_those_behind_do_not_break_that_off(
    number: int, kind: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    cleaned = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            cleaned.append(True)

    with pytest.raises(kind) as caught, terminable():
        work()
    assert caught.type is kind
    assert cleaned == [True]
    assert signal.getsignal(number) == before


def test_a_signal_waits_until_what_is_started_is_known() -> None:
    known = []

    def start() -> None:
        with unbroken():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            known.append(True)
        known.append(False)

    with pytest.raises(Terminated), terminable():
        start()
    assert known == [True]


def test_who_is_guarded_ends_with_one_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OURS], stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        child = int(ours.stdout.readline())
        assert not _ended(child)
        ours.kill()
    eventually(lambda: _ended(child))


def test_who_is_guarded_goes_on_where_the_guard_is_not_needed() -> None:
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as child:
        with guarded() as watch:
            watch(-child.pid)
            (guard,) = (
                process for process in psutil.Process().children() if process.name() == "sh"
            )
        assert not guard.is_running()
        assert child.poll() is None
        end(child, group=True)
    assert child.returncode == -signal.SIGTERM


def test_who_does_not_listen_is_killed() -> None:
    script = "trap '' TERM; echo up; sleep 1000 & wait; wait"
    with subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        end(child, group=True, grace_s=0.05)
    assert child.returncode == -signal.SIGKILL
