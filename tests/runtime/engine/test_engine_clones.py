"""Where a vLLM engine is to be a clone and none fits: said why, and done without or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.loader.timeline import Recorder
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.launch import Launch
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.replica.vllm_spec import VllmOptions
from tests.runtime.helpers import ask, finish, wait_for
from tests.snapshot.images import MODEL, draft
from tests.snapshot.test_manifest import MANIFEST

Make = Callable[..., Path]
PROMPT = list(range(5, 25))


@pytest.fixture
def store(tmp_path: Path) -> str:
    """A store with an image, which is of no model of ours."""
    path = tmp_path / "store" / "manifests"
    path.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o700)
    image = MANIFEST._replace(
        name="another", model=MODEL, machine=draft("another").machine, signature=None
    )
    file = path / f"{image.id}.json"
    file.write_bytes(image.encode())
    file.chmod(0o600)
    return str(path.parent)


def options(
    model: object, runs: Path, snapshot: SnapshotOptions, **given: object
) -> ReplicaOptions:
    asked: dict[str, object] = {"kv_bytes": 16 << 20, "threads": 1, **given}
    return ReplicaOptions(str(model), run_dir=str(runs), snapshot=snapshot, **asked)  # type: ignore[arg-type]


def test_one_is_required_and_there_are_none(no_leaks: Path, tmp_path: Path) -> None:
    snapshot = SnapshotOptions("require", str(tmp_path / "nothing"))
    alone = VllmOptions(alone=True)
    asked = options("/m", no_leaks, snapshot, prefill=0, decode=0, vllm=alone, hold_load=True)
    launch = Launch(asked, Recorder("front"))
    try:
        with pytest.raises(SnapshotError, match="cannot be a clone") as raised:
            launch.start_workers()
    finally:
        launch.close()
    assert raised.value.where == "/m in vLLM"
    assert "no image in" in str(raised.value.got)


def test_one_is_required_and_none_fits(demo_model: Make, no_leaks: Path, store: str) -> None:
    snapshot = SnapshotOptions("require", store)
    alone = VllmOptions(alone=True)
    asked = options(demo_model(), no_leaks, snapshot, prefill=0, decode=0, vllm=alone)
    with Replica(asked) as replica:
        wait_for(replica, lambda: replica.error is not None)
        assert isinstance(replica.error, SnapshotError)
        assert replica.error.where == f"{demo_model()} in vLLM"


def test_where_none_fits_it_starts_fresh_and_that_is_told(
    demo_model: Make, no_leaks: Path, store: str
) -> None:
    """It cannot, here, where there is no vLLM; the native workers serve on."""
    asked = options(demo_model(), no_leaks, SnapshotOptions("auto", store), vllm=VllmOptions())
    with Replica(asked) as replica:
        first = ask(replica, PROMPT, 4)
        finish(replica, first)
        wait_for(replica, lambda: replica.bridge.why is not None)
        assert "no vLLM" in str(replica.bridge.why)
        told = [*replica.spans, *replica.recorder.drain()]
        notes = [span.note or "" for span in told if span.name == "snapshot_restore"]
        (lost,) = (note for note in notes if note.startswith("vllm"))
        assert "failed: " in lost
        again = ask(replica, PROMPT, 4)
        finish(replica, again)
        assert again.tokens == first.tokens


def test_on_a_gpu_there_are_none(no_leaks: Path, store: str) -> None:
    snapshot = SnapshotOptions("auto", store)
    vllm = VllmOptions(alone=True, device="cuda:0")
    asked = options("/m", no_leaks, snapshot, device="cuda:0", vllm=vllm, hold_load=True)
    launch = Launch(asked, Recorder("front"))
    try:
        assert launch.engine_tiers.best is None
        assert "cuda:0" in launch.engine_tiers.why[0]
    finally:
        launch.close()
