"""What a served model has here is looked at beside the serving, whatever its disk does."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.runtime.endpoint import whereabouts
from coldframe.runtime.endpoint.whereabouts import Whereabouts
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions

Make = Callable[..., Path]


@pytest.fixture
def own(demo_model: Make, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_model("llama", "bfloat16"), tmp_path / "model"))


def test_a_mount_that_does_not_answer_stops_nobody(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, asked = threading.Event(), []
    look_at = whereabouts._look_at

    def stuck(options: ReplicaOptions, found: dict[str, Any]) -> None:
        asked.append(threading.current_thread())
        assert answers.wait(60)
        look_at(options, found)

    # No file system here can be made to hang: all that the kernel would do is not to come back.
    monkeypatch.setattr(whereabouts, "_look_at", stuck)
    there = Whereabouts()
    for _ in range(3):
        found = there._known("m", ReplicaOptions(str(own)))
        # What is not known is not made up.
        assert (found["looked"], found["fingerprint"]) == (False, None)
    answers.set()
    there._looking["m"].join(60)
    assert there._known("m", ReplicaOptions(str(own)))["looked"]
    assert len(asked) == 1  # one waits, however often it is asked
    assert threading.main_thread() not in asked


def looked(options: ReplicaOptions) -> dict[str, object]:
    """What is known once the thread has been there."""
    there = Whereabouts()
    assert not there._known("m", options)["looked"]
    there._looking["m"].join(60)
    found = there._known("m", options)
    assert found["looked"]
    return found


def test_files_are_told(own: Path) -> None:
    found = looked(ReplicaOptions(str(own)))
    assert found["fingerprint"] == Checkpoint.open(own).fingerprint


@pytest.mark.parametrize("model", ["/no\0path", "/nowhere", "s3://bucket/model"])
def test_what_cannot_be_looked_at_is_elsewhere(model: str) -> None:
    found = looked(ReplicaOptions(model))
    assert found["fingerprint"] is None
    assert found["weights"] == {"bytes": None, "at": "elsewhere", "cached": 0}


def test_a_store_that_is_none_has_no_image(own: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("a file")
    (own / "manifests").mkdir()
    for place in (store, own):  # a file, and a folder of other things
        found = looked(ReplicaOptions(str(own), snapshot=SnapshotOptions(store=str(place))))
        assert found["image"] is False
        assert found["fingerprint"] is not None


def test_a_config_that_is_none(own: Path) -> None:
    (own / "config.json").write_text("[" * 100_000)
    assert looked(ReplicaOptions(str(own)))["fingerprint"] is None
