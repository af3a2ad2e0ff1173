"""Workers on a GPU and images: there are none of them, and nobody waits for one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.runtime.options import SnapshotOptions
from coldframe.runtime.tiers import Tiers
from coldframe.snapshot.restorer_process import RestorerProcess
from tests.runtime.snapshots import Commands


def tiers(mode: str, runs: Path, restorer: RestorerProcess | None = None) -> Tiers:
    # Images that come over a network are looked for wherever there may be some.
    options = SnapshotOptions(mode, "s3://nowhere/images")
    return Tiers(options, "m", None, str(runs), restorer, device="cuda:0")


def test_workers_on_a_gpu_start_fresh_and_it_is_said_why(no_leaks: Path) -> None:
    # One was started by a guess at the command line, and is not needed now.
    found = tiers("auto", no_leaks, RestorerProcess())
    assert (found.best, found.no_image, found.failed) == (None, False, None)
    assert found.why == ["a worker on cuda:0 cannot be frozen: its context would be lost"]
    found.close()


def test_off_is_off_there_too(no_leaks: Path) -> None:
    assert tiers("off", no_leaks).why == ["snapshots are off"]


def test_clones_that_are_required_cannot_be_had_there(no_leaks: Path) -> None:
    with pytest.raises(SnapshotError, match="a worker on a GPU cannot be a clone") as raised:
        tiers("require", no_leaks, RestorerProcess())
    assert (raised.value.expected, raised.value.got) == ("--device cpu", "cuda:0")


def test_the_commands_refuse_it_before_anything_starts(
    demo_model: Callable[..., Path], commands: Commands, tmp_path: Path
) -> None:
    store = ("--snapshot-store", tmp_path / "store")
    model = demo_model("llama")
    asked = ("snapshot", "create", model, *store, "--device", "cuda")
    done = commands.call(*asked, code=1)
    assert (
        "coldframe: SnapshotError: a worker on a GPU cannot be frozen, in --device" in done.stderr
    )
    asked = ("run", model, "-p", "Once", *store, "--snapshot", "require", "--device", "cuda:0")
    told = json.loads(commands.call(*asked, "--json", code=1).stdout)
    assert (told["error"], told["where"]) == ("SnapshotError", str(model))
    assert not (tmp_path / "store").exists()
