"""Which ways there are to start a worker on a GPU, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.loader.timeline import Recorder
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica import tiers as tiers_module
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.replica.tiers import Tiers
from coldframe.runtime.start.early import likely_restorer
from tests.runtime.snapshots import Commands

# Images that come over a network are looked for wherever there may be some.
ELSEWHERE = "s3://nowhere/images"


def tiers(mode: str, runs: Path, store: str = ELSEWHERE) -> Tiers:
    return Tiers(SnapshotOptions(mode, store), "m", None, str(runs), device="cuda:0")


def test_a_clone_on_a_gpu_comes_of_an_image_and_of_no_template(
    no_leaks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiers_module, "templates", lambda: ["/nowhere/one.sock", "/nowhere/two"])
    found = tiers("auto", no_leaks)
    assert [cloner.tier for cloner in found.cloners] == ["image"]
    assert found.best is found.cloners[0]
    assert found.why == ["template: a fork has nothing of a context on cuda:0"]
    assert not found.no_image
    found.close()


def test_where_there_is_no_image_one_is_wanted(no_leaks: Path, tmp_path: Path) -> None:
    found = tiers("auto", no_leaks, str(tmp_path))
    assert (found.best, found.no_image, found.failed) == (None, True, None)
    assert found.why == [f"no image in {tmp_path}"]


def test_off_is_off_there_too(no_leaks: Path) -> None:
    assert tiers("off", no_leaks).why == ["snapshots are off"]


def test_a_clone_that_is_required_and_cannot_be_had(no_leaks: Path, tmp_path: Path) -> None:
    options = ReplicaOptions(
        "m",
        device="cuda:0",
        hold_load=True,
        run_dir=str(no_leaks),
        snapshot=SnapshotOptions("require", str(tmp_path)),
    )
    launch = Launch(options, Recorder("front"))
    with pytest.raises(SnapshotError, match="a worker cannot be a clone") as raised:
        launch.start_worker("prefill")
    launch.close()
    assert raised.value.got == f"no image in {tmp_path}"


def test_who_restores_is_started_for_a_gpu_too() -> None:
    asked = ["run", "m", "--device", "cuda:0", "--snapshot"]
    restorer = likely_restorer([*asked, ELSEWHERE])
    assert restorer is not None
    restorer.close()
    assert likely_restorer([*asked, "off"]) is None


def test_no_template_is_made_on_a_gpu(demo_model: Callable[..., Path], commands: Commands) -> None:
    asked = ("snapshot", "template", demo_model("llama"), "--device", "cuda")
    done = commands.call(*asked, code=1)
    assert "coldframe: SnapshotError: a worker on a GPU cannot be forked" in done.stderr


def test_no_image_is_made_where_there_is_no_gpu(
    demo_model: Callable[..., Path], commands: Commands, tmp_path: Path
) -> None:
    asked = ("snapshot", "create", demo_model("llama"), "--device", "cuda:7")
    done = commands.call(*asked, "--snapshot-store", tmp_path / "store", code=1)
    assert "coldframe: NoDevice: " in done.stderr
    assert not (tmp_path / "store").exists()
