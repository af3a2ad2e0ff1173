"""The capabilities of components/snapshots: enough to freeze and to restore, and none spare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coldframe.snapshot import identity, linux
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


_UNCHECKED = """
import importlib, sys
spared = sys.argv.pop(1)
early = (
    "import coldframe.snapshot.linux as linux; "
    f"linux._NEEDED = {{k: v for k, v in linux._NEEDED.items() if k != {spared!r}}}; "
)
for name in ("coldframe.snapshot.restorer_process", "coldframe.runtime.frozen.freezing"):
    module = importlib.import_module(name)
    module._MAIN = early + module._MAIN
from coldframe.runtime.cli import main
sys.exit(main())
"""
# The command, which tries it without a capability that it would ask for.


def without(name: str) -> list[str]:
    left = [other for other in given() if other != name]
    assert len(left) == len(given()) - 1
    return left


def command(
    *words: object, under: Iterable[str], spared: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end.

    Args:
        words: Of the command.
        under: A command that runs it.
        spared: A capability that it is not to ask for before it tries.
    """
    program = [COLDFRAME]
    if spared is not None:
        program = [sys.executable, "-P", "-c", _UNCHECKED, f"CAP_{spared.upper()}"]
    return subprocess.run(
        [*under, *program, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=110,
        env=without_settings(),
    )


def coldframe(*words: object, around: Iterable[str] = ()) -> str:
    """Runs a command with the manifest's capabilities: what it prints.

    Args:
        words: Of the command.
        around: A command that runs it.
    """
    done = command(*words, under=[*around, *under(given())])
    assert done.returncode == 0, done.stderr
    return done.stdout


class Warm(NamedTuple):
    """A model, and a store with an image of its worker."""

    model: Path
    store: Path


@pytest.fixture(scope="module")
def warm(criu: Criu, demo_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Warm:
    """An image that was made with the manifest's capabilities."""
    found = Warm(demo_model(), tmp_path_factory.mktemp("warm") / "images")
    coldframe("snapshot", "create", found.model, "--snapshot-store", found.store)
    return found


def restored(warm: Warm, name: str) -> subprocess.CompletedProcess[str]:
    """A run by a clone, without one capability."""
    asked = ("--prompt-ids", "5,6,7", "-n", "4", "--snapshot", "require")
    place = ("--snapshot-store", warm.store)
    return command("run", warm.model, *asked, *place, under=under(without(name)), spared=name)


@pytest.mark.parametrize("name", [name.removeprefix("CAP_").lower() for name in linux._NEEDED])
def test_without_one_of_these_criu_restores_nothing(name: str, warm: Warm) -> None:
    done = restored(warm, name)
    assert done.returncode == 1
    assert "a worker cannot be a clone" in done.stderr
    # Not we, but the kernel has said so.
    assert f"no CAP_{name.upper()}" not in done.stderr
    assert "image: " in done.stderr


@pytest.mark.parametrize("name", [name.removeprefix("CAP_").lower() for name in identity._NEEDED])
def test_without_one_of_these_what_faces_the_network_stays_roots(
    name: str, demo_model: Make
) -> None:
    with served(demo_model(), under=under(without(name))) as server:
        server.ready()
        status = Path(f"/proc/{server.gateway().pid}/status").read_text()
        assert "\nUid:\t0\t0\t0\t0\n" in status


def restricts_ptrace() -> bool:
    """Whether Yama lets a process trace its descendants alone, as it does on most nodes."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return scope.exists() and scope.read_text().strip() != "0"


def test_to_end_others_is_not_for_criu(warm: Warm) -> None:
    assert restored(warm, "kill").returncode == 0


def test_tracing_is_for_the_freeze_and_where_yama_is_on(warm: Warm, tmp_path: Path) -> None:
    assert restored(warm, "sys_ptrace").returncode == 0
    words = ("snapshot", "create", warm.model, "--snapshot-store", tmp_path / "images")
    done = command(*words, under=under(without("sys_ptrace")))
    assert (done.returncode == 0) is not restricts_ptrace(), done.stderr


def test_each_of_them_is_left_out_here() -> None:
    tried = {*linux._NEEDED, *identity._NEEDED, "CAP_SYS_PTRACE"}
    assert {f"CAP_{name.upper()}" for name in given()} == tried


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
