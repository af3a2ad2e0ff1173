"""Whether a helper may move contexts of other users' processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coldframe.loader.errors import NoCheckpoint
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.reach import check_reach, may_reach_others
from tests.support import unavailable

OTHER = Identity(65533, 65533, ())
HELPER = """
import sys
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import drop
drop(Identity(65534, 65534, ()))
print(1, flush=True)
sys.stdin.read()
"""


@contextmanager
def helper(code: str) -> Iterator[int]:
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process.pid
        process.kill()


def test_its_own_users_processes_are_in_reach() -> None:
    check_reach(os.getpid(), Identity.current())


def test_those_of_others_take_a_right() -> None:
    if os.geteuid() != 0:
        unavailable("becoming another user takes root")
    with helper(HELPER) as pid:
        check_reach(pid, Identity(65534, 65534, ()))
        with pytest.raises(NoCheckpoint, match="CAP_SYS_PTRACE, or user 65533") as refused:
            check_reach(pid, OTHER)
        assert "65534" in str(refused.value)
    if may_reach_others():
        check_reach(os.getpid(), OTHER)
    else:
        with pytest.raises(NoCheckpoint):
            check_reach(os.getpid(), OTHER)


def test_a_helper_that_is_gone() -> None:
    with helper("print(1, flush=True); input()") as pid:
        pass
    with pytest.raises(NoCheckpoint, match="gone"):
        check_reach(pid, OTHER)
