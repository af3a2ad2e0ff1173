from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from coldframe.loader.errors import ColdframeError, PlatformError, SnapshotError
from coldframe.loader.wire import Channel
from coldframe.snapshot.init import Init, start_init
from tests.snapshot.tiny import descriptors, gone, mounts, running, until
from tests.support import unavailable

NO_ADMIN = ["setpriv", "--bounding-set", "-sys_admin"]


def spawn(code: str) -> int:
    """What a body does: starts a process. Its PID there."""
    argv = [sys.executable, "-I", "-S", "-c", f"import os, signal, time\n{code}"]
    return os.posix_spawn(sys.executable, argv, {}, setsigmask=())


@pytest.fixture(autouse=True)
def _allowed() -> None:
    if os.geteuid() != 0:
        unavailable("only root may make PID namespaces")


@pytest.fixture
def started() -> Iterator[Any]:
    """Starts a PID 1 that stands in for a process with some code; ended after the test."""
    inits: list[Init] = []

    def start(code: str) -> Init:
        init = start_init(lambda _: spawn(code))
        inits.append(init)
        message = init.channel.recv(10)
        assert message is not None
        assert message.kind == "started"
        return init

    yield start
    for init in inits:
        init.kill()


# -- what it stands in for -----------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 7, 128, 255])
def test_it_ends_with_the_exit_code(started: Any, code: int) -> None:
    assert started(f"os._exit({code})").reap() == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_death_by_a_signal_is_told_from_an_exit_code(started: Any, number: int) -> None:
    no_core = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    assert started(f"{no_core}; os.kill(os.getpid(), {number})").reap() == -number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_passed_on(started: Any, tmp_path: Path, number: int) -> None:
    ready = tmp_path / "ready"
    init = started(
        f"signal.signal({number}, lambda number, _: os._exit(number))\n"
        f"open({str(ready)!r}, 'w').close()\n"
        "time.sleep(60)"
    )
    until(ready.exists)
    os.kill(init.pid, number)
    assert init.reap() == number


def test_a_signal_that_comes_too_early_is_kept(tmp_path: Path) -> None:
    go = tmp_path / "go"

    def body(channel: Channel) -> int:
        channel.send({"type": "here"})
        while not go.exists():
            time.sleep(0.002)
        return spawn("time.sleep(60)")

    init = start_init(body)
    try:
        assert init.channel.recv(10) is not None
        os.kill(init.pid, signal.SIGTERM)
        go.touch()
        assert init.reap() == -signal.SIGTERM
    finally:
        init.kill()


def test_its_own_death_is_told_as_that_of_what_it_stands_for(started: Any) -> None:
    init = started("time.sleep(60)")
    inside = init.inside()
    os.kill(init.pid, signal.SIGKILL)
    assert init.reap() == -signal.SIGKILL
    assert gone(inside)
    assert init.kill() == -signal.SIGKILL


@pytest.mark.heavy
def test_what_has_just_died_is_told_by_how_it_died(started: Any, tmp_path: Path) -> None:
    """Whoever sees its pipe close may end it before its PID 1 has been told."""
    no_core = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    for number in range(20):
        fifo = tmp_path / str(number)
        os.mkfifo(fifo)
        init = started(f"{no_core}; f = open({str(fifo)!r}, 'w'); os.kill(os.getpid(), 7)")
        with open(fifo) as reader:
            assert reader.read() == ""
        assert init.kill() == -signal.SIGBUS


def test_what_lives_is_ended(started: Any) -> None:
    init = started("time.sleep(60)")
    assert init.kill() == -signal.SIGKILL
    assert init.kill() == -signal.SIGKILL


# -- namespaces ----------------------------------------------------------------------------------


def test_inside_nothing_else_is_to_be_seen(started: Any, tmp_path: Path) -> None:
    told = tmp_path / "told"
    init = started(
        "import json\n"
        "seen = sorted(int(name) for name in os.listdir('/proc') if name.isdigit())\n"
        f"open({str(told)!r}, 'w').write(json.dumps([os.getpid(), os.getppid(), seen]))"
    )
    assert init.reap() == 0
    assert json.loads(told.read_text()) == [2, 1, [1, 2]]


def test_inside_it_is_found_from_outside(started: Any) -> None:
    init = started("time.sleep(60)")
    inside = init.inside()
    assert psutil.Process(inside).cmdline()[-1].endswith("time.sleep(60)")
    assert psutil.Process(inside).ppid() == init.pid
    init.kill()
    assert init.inside() is None


def test_whoever_starts_it_stays_where_it_is() -> None:
    before, fds = mounts(), descriptors()
    for _ in range(3):  # and can do it again
        init = start_init(lambda _: spawn("time.sleep(60)"))
        assert init.channel.recv(10) is not None
        assert os.readlink("/proc/self/ns/pid_for_children") == os.readlink("/proc/self/ns/pid")
        assert mounts() == before
        init.kill()
    assert descriptors() == fds
    # Nor does it stay the one that gets others' orphans.
    adopts = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(37, ctypes.byref(adopts), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
    assert adopts.value == 0


def test_its_proc_is_not_mounted_for_others_where_mounts_spread() -> None:
    """As on a machine with systemd, where mounts are shared by default."""
    under = ["unshare", "--mount", "--propagation", "shared"]
    with running("mounts_around_an_init", under=under) as (_, found):
        assert found["before"] == found["during"]
        assert found["shared"]


def test_it_has_no_descriptors_but_those_that_it_needs() -> None:
    kept, other = os.pipe()

    def body(channel: Channel) -> int:
        names = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        channel.send({"type": "seen", "fds_open": names, "own": channel.fileno()})
        return spawn("")

    init = start_init(body, [kept])
    try:
        message = init.channel.recv(10)
        assert message is not None
        seen, own = message.body["fds_open"], message.body["own"]
        assert {0, 1, 2, kept, own} < set(seen)
        assert len(seen) == 6  # with that of the listing
    finally:
        init.kill()
        os.close(kept)
        os.close(other)


# -- others inside -------------------------------------------------------------------------------


def test_orphans_are_reaped(started: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"
    init = started(
        "for _ in range(3):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        if os.fork() == 0: time.sleep(0.02)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        f"open({str(go)!r}, 'w').close()\n"
        "time.sleep(60)"
    )
    until(go.exists)
    until(lambda: len(psutil.Process(init.pid).children(recursive=True)) == 1)


def test_orphans_end_with_it(started: Any, tmp_path: Path) -> None:
    go = tmp_path / "go"
    init = started(
        "child = os.fork()\n"
        "if child == 0:\n"
        "    if os.fork() == 0: os.setsid(); signal.signal(15, signal.SIG_IGN); time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.002)\n"
        "os._exit(5)"
    )
    until(lambda: len(psutil.Process(init.pid).children()) == 2)
    inside = [process.pid for process in psutil.Process(init.pid).children()]
    go.touch()
    assert init.reap() == 5
    assert all(gone(pid) for pid in inside)


def test_nothing_outlives_whoever_started_it() -> None:
    with running("hold_an_init") as (holder, found):
        assert not any(gone(pid) for pid in found["pids"])
        holder.kill()
        until(lambda: all(gone(pid) for pid in found["pids"]))


# -- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SnapshotError("it is so", got="that"), ValueError("that")])
def test_a_failure_inside_is_told(error: Exception) -> None:
    def body(_: Channel) -> NoReturn:
        raise error

    init = start_init(body)
    message = init.channel.recv(10)
    assert message is not None
    assert message.kind == "failed"
    told = ColdframeError.from_wire(message.body["error"])
    assert isinstance(told, SnapshotError)
    assert "that" in str(told.got)
    assert init.channel.recv(10) is None
    assert init.reap() == 1


def test_without_privileges_it_says_so() -> None:
    with running("try_an_init", under=NO_ADMIN) as (_, found):
        error = ColdframeError.from_wire(found["error"])
        assert isinstance(error, PlatformError)
        assert error.got == "Operation not permitted"
        assert "CAP_SYS_ADMIN" in str(error.hint)
        assert found["left"] == []
