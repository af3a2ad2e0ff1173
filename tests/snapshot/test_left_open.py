"""What a process has left of device files, which CRIU cannot write."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot import left_open as module
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.left_open import check_nothing_left_open, left_open
from tests.snapshot.tiny import frozen

HAS = """
import mmap, sys
files = [open(path, "rb") for path in sys.argv[1:]]
mapped = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in files[1:]]
print(1, flush=True)
sys.stdin.read()
"""


@contextmanager
def having(*paths: Path) -> Iterator[int]:
    """A process that has these files open, and all but the first of them mapped: its PID."""
    with subprocess.Popen(
        [sys.executable, "-c", HAS, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that are called as a driver's are."""
    monkeypatch.setattr(module, "DEVICES", str(tmp_path / "nvidia"))
    paths = [tmp_path / name for name in ("nvidiactl", "nvidia0", "other")]
    for path in paths:
        path.write_bytes(b"x")
    return paths


def test_descriptors_and_mappings_are_found(devices: list[Path]) -> None:
    with having(*devices) as pid:
        control, first, _ = map(str, devices)
        assert left_open(pid) == (first, f"{first}, mapped", control)
        with pytest.raises(SnapshotError, match=f"{first}, mapped"):
            check_nothing_left_open(pid)


def test_nothing_of_a_gpu_is_left() -> None:
    with having() as pid:
        assert left_open(pid) == ()
        check_nothing_left_open(pid)


def test_a_process_that_is_gone() -> None:
    with having() as pid:
        pass
    with pytest.raises(SnapshotError, match="cannot be seen"):
        left_open(pid)


def test_a_worker_that_has_some_is_not_dumped(
    criu: Criu, tmp_path: Path, devices: list[Path]
) -> None:
    def checkpointed(_: int, own_bytes: int) -> dict[str, Any]:
        return {"bytes": 7, "uuids": {"GPU-1": "A GPU"}, "error": None}

    prepare = f"more = {{'gpu': {{'plan': 'p'}}}}; kept = open({str(devices[0])!r})"
    with pytest.raises(SnapshotError, match="nvidiactl"):
        frozen(criu, tmp_path / "image", prepare, checkpoint=checkpointed)
    assert list((tmp_path / "image").iterdir()) == []
