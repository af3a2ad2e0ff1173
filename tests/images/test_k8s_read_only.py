"""components/snapshots-read-only: its rights are enough to use images, and too few to make one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from coldframe.snapshot.criu import Criu
from tests.images.k8s import built, ours, pods
from tests.images.runtime_default import PROFILE
from tests.images.test_k8s_rights import coldframe, command, under
from tests.runtime.serving import served
from tests.support import unavailable

pytestmark = pytest.mark.images

Make = Callable[..., Path]
SETS = ("deployment-snapshots", "components/snapshots-read-only")
_READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'


def as_in_its_pod(store: Path) -> list[str]:
    """What runs a command with the rights that the manifest gives.

    Args:
        store: The volume with images, which nobody may write to.
    """
    (pod,) = pods(built(*SETS))
    (container,) = ours(pod)
    assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (mount,) = [m for m in container["volumeMounts"] if m["name"] == "snapshots"]
    assert mount["readOnly"] is True
    names = container["securityContext"]["capabilities"]["add"]
    if not PROFILE.exists():
        unavailable(f"{PROFILE} is not there (make images-system)")
    return [
        *("unshare", "--mount", "sh", "-c", _READ_ONLY, "sh", str(store)),
        *(sys.executable, "-P", str(Path(__file__).with_name("runtime_default.py"))),
        ",".join(f"CAP_{name}" for name in names),
        *under(name.lower() for name in names),
    ]


def test_images_are_used_under_the_runtimes_own_filter(
    criu: Criu, demo_model: Make, tmp_path: Path
) -> None:
    model, store = demo_model(), tmp_path / "images"
    coldframe("snapshot", "create", model, "--snapshot-store", store)
    pod = as_in_its_pod(store)
    settings = {"COLDFRAME_SNAPSHOT": "require", "COLDFRAME_NO_SNAPSHOT_CREATE": "1"}
    place = ("--snapshot-store", store)
    with served(model, *place, under=pod, **settings) as server:
        server.ready()
        assert server.complete(max_tokens=4)
        assert server.metrics()["coldframe_coldstarts_total{image}"] == 1
        front = psutil.Process(server.process.pid)
        for process in (front, *front.children(recursive=True)):
            assert "\nSeccomp:\t2\n" in Path(f"/proc/{process.pid}/status").read_text()
    # With the same filter none is made, however many capabilities there are.
    done = command("snapshot", "create", model, "--snapshot-store", tmp_path / "others", under=pod)
    assert done.returncode == 1
    assert "SnapshotError" in done.stderr
