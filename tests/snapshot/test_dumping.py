"""A worker on a GPU is frozen: somebody else has its context checkpointed before CRIU comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.loader.errors import ColdframeError, DeviceError, SnapshotError
from coldframe.loader.wire import Channel
from coldframe.snapshot.criu import Criu
from tests.snapshot.tiny import frozen, until

OWN = 3 << 20
ON_A_GPU = f"more = {{'gpu': {{'plan': 'p'}}, 'own_bytes': {OWN}}}"
DONE = {"bytes": 7, "uuids": {"GPU-1": "A GPU"}, "error": None}


class Helper:
    """Who has contexts checkpointed; it says how that goes."""

    def __init__(self, error: ColdframeError | None = None) -> None:
        self.error = error
        self.workers: list[psutil.Process] = []

    def __call__(self, pid: int, own_bytes: int) -> dict[str, Any]:
        assert own_bytes == OWN
        worker = psutil.Process(pid)
        assert "tests.snapshot.tiny" in " ".join(worker.cmdline())
        assert worker.is_running()
        self.workers.append(worker)
        if self.error is not None:
            raise self.error
        return DONE

    @property
    def gone(self) -> bool:
        return not any(worker.is_running() for worker in self.workers)


def test_its_context_is_checkpointed_first(criu: Criu, tmp_path: Path) -> None:
    ours, theirs = Channel.pair()
    helper = Helper()
    # It has what came beside its order, and lets it go as a real one does before it is frozen.
    prepare = f"{ON_A_GPU}; os.write(fds[0], b'x'); os.close(fds[0])"
    said = frozen(criu, tmp_path / "image", prepare, fds=[theirs.fileno()], checkpoint=helper).said
    assert said["gpu"] == {"plan": "p"}
    assert said["checkpointed"] == DONE
    assert len(helper.workers) == 1
    assert helper.gone
    theirs.close()
    # Nobody else has the other end any more, whatever is left of those who passed it on.
    assert ours.wait_readable(20)
    assert ours.recv() is None
    ours.close()


def test_nobody_is_asked_for_a_worker_on_the_cpu(criu: Criu, tmp_path: Path) -> None:
    helper = Helper()
    assert "checkpointed" not in frozen(criu, tmp_path / "image", checkpoint=helper).said
    assert not helper.workers


def test_a_context_that_cannot_be_checkpointed(criu: Criu, tmp_path: Path) -> None:
    helper = Helper(DeviceError("no", got="CUDA_ERROR_NOT_SUPPORTED"))
    with pytest.raises(DeviceError, match="CUDA_ERROR_NOT_SUPPORTED"):
        frozen(criu, tmp_path / "image", ON_A_GPU, checkpoint=helper)
    until(lambda: helper.gone)
    assert list((tmp_path / "image").iterdir()) == []


def test_nobody_can(criu: Criu, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="nobody can checkpoint"):
        frozen(criu, tmp_path / "image", ON_A_GPU)
