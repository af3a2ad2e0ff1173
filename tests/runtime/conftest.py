"""One image for all tests that restore it, and a check that commands leave nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coldframe.snapshot.criu import Criu
from tests.runtime.snapshots import Commands, Made, eventually, install_hook, left_behind


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose minutes where the cores are shared:
    threads that wait for one another at every step wait for whoever else computes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made(
    criu: Criu, demo_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    """An image of the tiny demo model, whose clones run a hook of another package."""
    base = tmp_path_factory.mktemp("snapshots")
    model, store, runs = demo_model("llama"), base / "store", base / "runs"
    runs.mkdir()
    path = os.pathsep.join([str(install_hook(base / "site")), os.environ.get("PYTHONPATH", "")])
    commands = Commands(runs, base / "cache")
    document = commands.json(
        *("snapshot", "create", model, "--snapshot-store", store),
        PYTHONPATH=path.rstrip(os.pathsep),
        ONLY_THE_CREATORS="secret-of-the-creator",
    )
    assert left_behind(runs) == []
    assert list(runs.iterdir()) == []
    return Made(model, store, document["image"])


@pytest.fixture
def commands(no_leaks: Path, tmp_path: Path) -> Iterator[Commands]:
    """Commands; afterwards no process of theirs is left, wherever it is by now, and no mount."""
    yield Commands(no_leaks, tmp_path / "cache")
    eventually(lambda: not left_behind(no_leaks))
    assert str(no_leaks) not in Path("/proc/self/mountinfo").read_text()
