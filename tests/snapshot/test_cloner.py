from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from coldframe.loader.errors import ReplicaError, SnapshotError
from coldframe.snapshot import cloner as cloner_module
from coldframe.snapshot.cloner import CloneEvent, Cloner
from coldframe.snapshot.criu import Criu
from tests.snapshot.conftest import Stored
from tests.snapshot.tiny import ask, ask_for, event, gone, mounts, until, wanted

Start = Callable[[], Cloner]


@pytest.fixture
def start(stored: Stored, tmp_path: Path) -> Iterator[Start]:
    """Starts a cloner for the tiny worker; nothing of it may be left."""
    cloners: list[Cloner] = []
    before = mounts(tmp_path)

    def spawn() -> Cloner:
        cloner = Cloner.spawn_restorer()
        cloners.append(cloner)
        cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
        assert event(cloner) == CloneEvent(None, None)
        return cloner

    yield spawn
    for cloner in cloners:
        below = inside(cloner)
        cloner.close()
        until(lambda below=below: all(gone(pid) for pid in below))  # type: ignore[misc]
    assert mounts(tmp_path) == before


def inside(cloner: Cloner) -> list[int]:
    """The process that makes clones, and all that comes of it."""
    assert cloner._child is not None
    try:
        process = psutil.Process(cloner._child.pid)
    except psutil.NoSuchProcess:
        return []
    return [process.pid, *(child.pid for child in process.children(recursive=True))]


@pytest.fixture
def faulty(criu: Criu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell script in place of `criu restore`; CRIU and what it gets are `"$@"` there."""

    def put(restore: str) -> None:
        script = tmp_path / "criu"
        script.write_text(
            f'#!/bin/sh\ncase "$1" in\nrestore) set -- {criu.path} "$@"; {restore};;\n'
            f'*) exec {criu.path} "$@";;\nesac\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("COLDFRAME_CRIU", str(script))

    return put


# -- like a child --------------------------------------------------------------------------------


def test_a_clone_is_used_like_a_child(start: Start) -> None:
    cloner = start()
    child, control = ask_for(cloner, "clone")
    assert child.poll() is None
    assert child.pid == 0
    assert event(cloner) == CloneEvent("clone", None)
    assert child.poll() is None
    assert psutil.Process(child.pid).is_running()
    control.send({"first": "os._exit(7)", "value": ""})
    assert child.wait() == 7
    assert (child.poll(), child.wait(), child.kill()) == (7, 7, 7)
    assert gone(child.pid)
    control.close()


def test_a_clone_is_killed(start: Start) -> None:
    cloner = start()
    child, control = ask_for(cloner, "clone")
    assert event(cloner).error is None
    assert child.kill() == -9
    assert gone(child.pid)
    assert control.recv(5) is None
    control.close()
    assert not cloner.closed


def test_a_clone_is_killed_on_its_way(start: Start) -> None:
    cloner = start()
    child, control = ask_for(cloner, "clone")
    assert child.kill() == -9
    assert control.recv(5) is None
    control.close()


def test_death_by_a_signal(start: Start) -> None:
    cloner = start()
    child, control = ask_for(cloner, "clone")
    assert event(cloner).error is None
    os.kill(child.pid, signal.SIGSEGV)
    assert child.wait() == -signal.SIGSEGV
    control.close()


def test_what_was_asked_for_after_the_end(start: Start) -> None:
    cloner = start()
    child, control = ask_for(cloner, "clone")
    assert event(cloner).error is None
    below = inside(cloner)
    reason = SnapshotError("it is enough")
    cloner.end(reason)
    assert event(cloner) == CloneEvent("clone", reason)
    assert event(cloner) == CloneEvent(None, reason)
    assert child.poll() == -9
    until(lambda: all(gone(pid) for pid in below))
    late, second = ask_for(cloner, "late")
    assert event(cloner) == CloneEvent("late", reason)
    assert late.kill() == 1
    cloner.end(SnapshotError("again"))
    assert cloner.error is reason
    assert not cloner.events
    control.close()
    second.close()


# -- CRIU fails ----------------------------------------------------------------------------------


def test_criu_dies_before_it_has_done_anything(start: Start, faulty: Callable[[str], None]) -> None:
    faulty("kill -9 $$")
    cloner = start()
    child, control = ask_for(cloner, "clone")
    name, error = event(cloner)
    assert name == "clone"
    assert isinstance(error, SnapshotError)
    assert error.got == "signal 9: it left no log"
    assert child.wait() == 1
    assert control.recv(5) is None
    control.close()
    assert not cloner.events  # that it has ended is no news
    cloner.end(ReplicaError("it is enough"))
    assert event(cloner).name is None
    assert not cloner.events


@pytest.mark.parametrize("stage", ["post-restore", "pre-resume"])
def test_criu_dies_half_way(
    start: Start, faulty: Callable[[str], None], tmp_path: Path, stage: str
) -> None:
    action = tmp_path / "action"
    action.write_text(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != {stage} ] || kill -9 $PPID\n')
    action.chmod(0o755)
    faulty(f'exec "$@" --action-script {action}')
    cloner = start()
    child, control = ask_for(cloner, "clone")
    name, error = event(cloner)
    assert name == "clone"
    assert isinstance(error, SnapshotError)
    assert "signal 9" in str(error.got)
    assert child.wait() == 1
    # Whatever there was of the clone is gone with its PID 1.
    assert control.recv(5) is None
    control.close()
    assert len(inside(cloner)) == 1


def test_criu_says_no_and_the_next_clone_is_tried(
    start: Start, faulty: Callable[[str], None], tmp_path: Path
) -> None:
    once = tmp_path / "once"
    faulty(f'[ -e {once} ] && exec "$@"; touch {once}; exit 3')
    cloner = start()
    first, control = ask_for(cloner, "first")
    error = event(cloner).error
    assert error is not None
    assert error.got == "exit status 3: it left no log"
    assert first.wait() == 1
    control.close()
    second, control = ask_for(cloner, "second")
    assert event(cloner) == CloneEvent("second", None)
    assert ask(control, "state") == 41
    control.close()
    assert second.wait() == 0


def test_a_criu_that_hangs_is_killed(start: Start, faulty: Callable[[str], None]) -> None:
    faulty("sleep 600")
    cloner = start()
    child, control = ask_for(cloner, "clone")
    other, second = ask_for(cloner, "other")
    until(lambda: len(inside(cloner)) >= 5)  # itself; of each the PID 1 and the script
    assert child.kill() == -9
    assert control.recv(5) is None
    below = inside(cloner)
    cloner.end(SnapshotError("a clone was not there in time"))
    assert event(cloner).name == "other"
    assert other.poll() == -9
    until(lambda: all(gone(pid) for pid in below))
    control.close()
    second.close()


def test_one_that_does_not_answer_is_given_up(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloner_module, "_END_S", 0.1)
    cloner = start()
    child, control = ask_for(cloner, "clone")
    assert event(cloner).error is None
    below = inside(cloner)
    os.kill(below[0], signal.SIGSTOP)
    assert child.kill() == -9
    assert cloner.closed
    assert "does not answer" in str(cloner.error)
    until(lambda: all(gone(pid) for pid in below))
    control.close()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ReplicaError, match="no template listens there"):
        Cloner.connect(str(tmp_path / "none"))
