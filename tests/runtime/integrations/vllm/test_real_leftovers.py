"""What vLLM leaves behind lies in a replica's run directory, and goes with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import PlatformError
from coldframe.runtime.integrations.vllm.environment import own_places
from coldframe.runtime.replica.replica import Replica
from tests.runtime.integrations.vllm.bridges import options, pid_of, vllm_is_up
from tests.runtime.integrations.vllm.leftovers import leftovers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]


def test_an_engine_that_is_killed_leaves_nothing(
    demo_model: Callable[..., Path], no_leaks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Replica(options(demo_model(), no_leaks, alone=True)) as replica:
        vllm_is_up(replica)
        # It does make some, so that there is something to leave.
        assert leftovers(Path(replica.run_dir))
        os.kill(pid_of(replica, "vllm"), signal.SIGKILL)
    assert leftovers(tmp_path) == []  # and of the other `no_leaks` says it


def test_a_folder_of_its_own_has_room_for_sockets_or_is_refused(
    no_leaks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(no_leaks))
    with own_places({"TORCHINDUCTOR_CACHE_DIR": "/kept"}) as places:
        folder = Path(places["VLLM_RPC_BASE_PATH"])
        assert folder.parent == no_leaks
        assert places["TMPDIR"] == str(folder)
        assert places["TORCHINDUCTOR_CACHE_DIR"] == "/kept"
        (folder / "vllm_dist_0").touch()
    assert not folder.exists()
    long = no_leaks / ("x" * 30)
    long.mkdir()
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(long))
    with pytest.raises(PlatformError, match="too long for sockets of vLLM's"), own_places({}):
        pass
    assert list(long.iterdir()) == []
    long.rmdir()
