from __future__ import annotations

import os
from pathlib import Path

import pytest

from coldframe.loader.errors import PlatformError
from coldframe.loader.timeline import Recorder
from coldframe.runtime.launch import Launch
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.replica import Replica


def test_it_is_closed_once(no_leaks: Path) -> None:
    launch = Launch(ReplicaOptions("m", hold_load=True, run_dir=str(no_leaks)), Recorder("front"))
    launch.close()
    # Somebody else's now, with the same numbers.
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    launch.close()
    for fd in fds:
        os.close(fd)


def test_a_worker_that_cannot_be_started_is_the_error(
    no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PlatformError("no process is left")

    monkeypatch.setattr("coldframe.runtime.launch.spawn_python", refuse)
    with pytest.raises(PlatformError, match="no process is left"):
        Replica(ReplicaOptions("m", hold_load=True, run_dir=str(no_leaks)))
