"""The capabilities of components/snapshots: enough to freeze and to restore, and none spare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from coldframe.snapshot import linux
from coldframe.snapshot.criu import Criu
from tests.images.k8s import built, ours, pods
from tests.runtime.serving import COLDFRAME, served
from tests.support import unavailable, without_settings

pytestmark = pytest.mark.heavy

Make = Callable[..., Path]

REPORT = """
import json
from coldframe.snapshot.check import snapshot_report
print(json.dumps(snapshot_report()))
"""


def given() -> list[str]:
    """The capabilities that the manifest gives, as setpriv calls them."""
    (pod,) = pods(built("deployment-snapshots"))
    (container,) = ours(pod)
    return [name.lower() for name in container["securityContext"]["capabilities"]["add"]]


def under(capabilities: Iterable[str]) -> list[str]:
    """What runs a command as root with those capabilities, and no way to any other."""
    if os.geteuid() != 0:
        unavailable("to give capabilities away wants root")
    kept = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    return ["setpriv", "--inh-caps", "-all", "--ambient-caps", "-all", "--bounding-set", kept]


def report(capabilities: Iterable[str]) -> dict[str, Any]:
    done = subprocess.run(
        [*under(capabilities), sys.executable, "-P", "-c", REPORT],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=without_settings(),
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_they_are_enough_without_a_user_namespace(criu: Criu) -> None:
    found = report(given())
    assert found["error"] is None
    assert found["namespaces"] == "root"


def test_without_one_that_a_restore_takes_they_are_not(criu: Criu) -> None:
    for name in (name.removeprefix("CAP_").lower() for name in linux._NEEDED):
        left = [other for other in given() if other != name]
        assert len(left) == len(given()) - 1
        assert report(left)["namespaces"] != "root", name


def coldframe(*words: object, around: Iterable[str] = ()) -> str:
    """Runs a command with the manifest's capabilities: what it prints.

    Args:
        words: Of the command.
        around: A command that runs it.
    """
    done = subprocess.run(
        [*around, *under(given()), COLDFRAME, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=110,
        env=without_settings(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_worker_is_frozen_and_comes_back_with_them(
    criu: Criu, demo_model: Make, tmp_path: Path
) -> None:
    model, store = demo_model(), tmp_path / "images"
    coldframe("snapshot", "create", model, "--snapshot-store", store)
    # SYS_PTRACE is for the freeze alone, as the manifest says.
    restoring = [name for name in given() if name != "sys_ptrace"]
    require = {"COLDFRAME_SNAPSHOT": "require", "COLDFRAME_SNAPSHOT_STORE": str(store)}
    with served(model, under=under(restoring), **require) as server:
        server.ready()
        assert server.complete(max_tokens=4)
        assert server.metrics()["coldframe_coldstarts_total{image}"] == 1
        # What faces the network is nobody's who has any right.
        status = Path(f"/proc/{server.gateway().pid}/status").read_text()
        assert "\nUid:\t65532\t65532\t65532\t65532\n" in status
        assert "\nCapPrm:\t0000000000000000\n" in status


def test_so_it_does_in_a_user_namespace_of_the_pods_own(
    criu: Criu, demo_model: Make, tmp_path: Path
) -> None:
    # As `hostUsers: false` and an unmasked /proc have it, but for who root is outside.
    own = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*own, "true"], capture_output=True, check=False).returncode != 0:
        unavailable("user namespaces are not allowed here")
    model, store = demo_model(), ("--snapshot-store", tmp_path / "images")
    coldframe("snapshot", "create", model, *store, around=own)
    asked = ("--prompt-ids", "5,6,7", "-n", "4", "--json")
    told = json.loads(coldframe("run", model, *asked, "--snapshot", "require", *store, around=own))
    assert told["snapshot"]["tier"] == "image"
