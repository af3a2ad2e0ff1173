from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from coldframe.loader.errors import (
    ColdframeError,
    NoImage,
    PlatformError,
    ReplicaError,
    SnapshotError,
)
from coldframe.snapshot.cloner import Cloner
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.inherited import Inherited
from coldframe.snapshot.wake import Wake
from tests.snapshot.conftest import Stored
from tests.snapshot.tiny import (
    Image,
    ask,
    ask_for,
    descriptors,
    event,
    gone,
    mounts,
    running,
    starting,
    until,
    wanted,
)
from tests.support import unavailable

NO_ADMIN = ["setpriv", "--bounding-set", "-sys_admin"]
NO_NAMESPACES = [
    *("unshare", "--user", "--map-root-user", "sh", "-c"),
    'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"',
    "sh",
]
"""The user namespace is there only because it has a limit of its own for the next ones."""


def restorer_of(cloner: Cloner) -> int:
    assert cloner._child is not None
    return cloner._child.pid


def order(stored: Stored, work: Path, **other: Any) -> str:
    return json.dumps({**wanted(stored.store, stored.manifest, work), **other})


# -- clones --------------------------------------------------------------------------------------


def test_eight_at_once_from_one_image(stored: Stored, tmp_path: Path) -> None:
    before, fds = mounts(tmp_path), descriptors()
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, None, tmp_path))
    clones = [ask_for(cloner, f"clone-{number}") for number in range(8)]
    events = [event(cloner) for _ in range(9)]
    assert [error for _, error in events] == [None] * 9
    assert cloner.image == stored.manifest.id
    assert cloner.manifest == stored.manifest.to_json()
    for number, (_, control) in enumerate(clones):
        assert ask(control, "(state, os.getpid())") == [41, stored.manifest.process.pid]
        ask(control, "None", f"state = {number}")
    assert [ask(control, "state") for _, control in clones] == list(range(8))
    assert len({child.pid for child, _ in clones}) == 8
    restorer = restorer_of(cloner)
    # Each under a PID 1 of its own, which is the restorer's child.
    above = {psutil.Process(child.pid).parent() for child, _ in clones}
    assert len(above) == 8
    assert {process.ppid() for process in above if process} == {restorer}
    # It has the image in a tmpfs that nobody else sees.
    seen = Path(f"/proc/{restorer}/mountinfo").read_text()
    assert f" {tmp_path}/clones " in seen
    assert mounts(tmp_path) == before
    assert list((tmp_path / "clones").iterdir()) == []
    names = [span[0] for span in cloner.spans]
    assert names == ["interpreter", "imports", "snapshot_check", "snapshot_read"]
    cloner.close()
    assert gone(restorer)
    until(lambda: all(gone(child.pid) for child, _ in clones))
    for _, control in clones:
        control.close()
    assert mounts(tmp_path) == before
    assert descriptors() == fds


def test_twenty_clones_leave_nothing_in_the_restorer(stored: Stored, tmp_path: Path) -> None:
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
    assert event(cloner).error is None
    restorer = restorer_of(cloner)
    fds = descriptors(restorer)
    inside = Path(f"/proc/{restorer}/root{tmp_path}/clones")
    for number in range(20):
        child, control = ask_for(cloner, f"clone-{number}")
        assert event(cloner) == (f"clone-{number}", None)
        if number % 2:
            control.close()
            assert child.wait() == 0
        else:
            assert child.kill() == -9
            control.close()
    assert descriptors(restorer) == fds
    assert [path.name for path in inside.iterdir()] == ["image"]
    assert psutil.Process(restorer).children() == []
    cloner.close()


def test_an_image_that_is_used_in_place(stored: Stored, image: Any, tmp_path: Path) -> None:
    """Not hashed, and where it is stored uncompressed not even copied."""
    store = tmp_path / "store"
    manifest = image.stored(store, compress="none")
    cloner = Cloner.spawn_restorer()
    cloner.prepare({**wanted(store, manifest, tmp_path), "hash": False})
    child, control = ask_for(cloner, "clone")
    assert [event(cloner).error, event(cloner).error] == [None, None]
    assert ask(control, "state") == 41
    control.close()
    assert child.wait() == 0
    cloner.close()


# -- what a clone may not have, and what it gets -------------------------------------------------


@pytest.mark.parametrize("hashed", [True, False])
def test_a_clone_cannot_reach_what_the_next_one_is_made_of(
    image: Any, tmp_path: Path, hashed: bool
) -> None:
    store = tmp_path / "store"
    manifest = image.stored(store, compress="none")
    cloner = Cloner.spawn_restorer()
    cloner.prepare({**wanted(store, manifest, tmp_path), "hash": hashed})
    assert event(cloner).error is None
    for name in ("one", "other"):
        child, control = ask_for(cloner, name)
        assert event(cloner).error is None
        assert ask(control, f"[state, os.listdir({str(tmp_path / 'clones')!r})]") == [41, []]
        assert str(tmp_path) not in ask(control, "open('/proc/self/mountinfo').read()")
        control.close()
        assert child.wait() == 0
    # The restorer itself has it still.
    inside = Path(f"/proc/{restorer_of(cloner)}/root{tmp_path}/clones/image")
    assert len(list(inside.iterdir())) > 1
    cloner.close()


REFUSED = """
import errno
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import drop
drop(Identity(0, 0, ()))
def refused(path):
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        return errno.errorcode[error.errno]
"""


def test_a_clone_of_root_cannot_change_the_machine(stored: Stored, tmp_path: Path) -> None:
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
    _, control = ask_for(cloner, "clone")
    assert [event(cloner).error, event(cloner).error] == [None, None]
    paths = ["/proc/sys/kernel/core_pattern", "/proc/sys/kernel/ns_last_pid"]
    paths += [path for path in ("/proc/sysrq-trigger",) if os.path.exists(path)]
    told = ask(control, f"[refused(path) for path in {paths}]", REFUSED)
    assert told == ["EROFS"] * len(paths)
    assert ask(control, "refused('/proc/self/oom_score_adj')") is None  # its own it may
    control.close()
    cloner.close()


def may_raise_limits() -> bool:
    """Whether this process has CAP_SYS_RESOURCE, as root in a container need not have."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> 24 & 1)


CREATOR = 'umask 0; ulimit -n 777; ulimit -S -s 4096; exec nice -n 15 choom -n 321 -- "$@"'
SHED = """
from coldframe.loader.wire import Message
from coldframe.snapshot.hooks import Hooks
from coldframe.snapshot.privileges import shed
from coldframe.snapshot.inherited import Inherited
from coldframe.snapshot.wake import Wake
hooks = Hooks.standard()
made = Inherited.here().to_wire()
shed()
"""


def test_it_inherits_from_this_start(criu: Any, tmp_path: Path) -> None:
    directory = tmp_path / "frozen"
    args = (str(directory), SHED)
    with running("freeze_one", *args, under=["sh", "-c", CREATOR, "sh"]) as (_, said):
        assert "error" not in said
    manifest = Image(criu, str(directory), said).stored(tmp_path / "store")
    body = Wake.message("clone", {}, 1, "/run", 1, Identity.current())
    here = Inherited.here()
    assert Inherited.from_wire(body["inherited"]) == here
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(tmp_path / "store", manifest, tmp_path))
    _, control = ask_for(cloner, "clone")
    assert [event(cloner).error, event(cloner).error] == [None, None]
    made = Inherited.from_wire(ask(control, "made"))
    assert (made.umask, made.nice, made.oom_score_adj) == (0, here.nice + 15, 321)
    assert made.limits["RLIMIT_NOFILE"] == (777, 777)
    assert made.limits["RLIMIT_STACK"][0] == 4096 << 10
    limits = dict(here.limits)
    if not may_raise_limits():
        limits["RLIMIT_NOFILE"] = (777, 777)
    first = f"hooks.run(Wake.from_message(Message({body!r}, ()), 1))"
    got = Inherited.from_wire(ask(control, "Inherited.here().to_wire()", first))
    assert got == replace(here, limits=limits)
    control.close()
    cloner.close()


def test_a_clone_that_has_just_died_is_told_by_how_it_died(stored: Stored, tmp_path: Path) -> None:
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
    assert event(cloner).error is None
    no_core = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    for number in range(50):
        child, control = ask_for(cloner, f"clone-{number}")
        assert event(cloner).error is None
        control.send({"first": f"{no_core}; os.kill(os.getpid(), 7)", "value": "0"})
        with contextlib.suppress(ReplicaError):  # as a front sees it
            assert control.recv(5) is None
        assert child.kill() == -signal.SIGBUS
        control.close()
    cloner.close()


# -- nothing is left -----------------------------------------------------------------------------


def test_nothing_outlives_a_front_that_is_killed(stored: Stored, tmp_path: Path) -> None:
    before = mounts(tmp_path)
    with running("front", order(stored, tmp_path), "3") as (front, report):
        assert report["errors"] == []
        inits = [psutil.Process(pid).ppid() for pid in report["clones"]]
        front.kill()
        for pid in (report["restorer"], *inits, *report["clones"]):
            until(lambda pid=pid: gone(pid))  # type: ignore[misc]
    assert mounts(tmp_path) == before
    shutil.rmtree(tmp_path / "clones")  # as the sweep of run directories does


def test_nor_does_a_criu_that_hangs(criu: Any, stored: Stored, tmp_path: Path) -> None:
    script, hangs = tmp_path / "criu", tmp_path / "hangs"
    script.write_text(
        f'#!/bin/sh\n[ "$1" != restore ] || {{ touch {hangs}; sleep 600; }}\n'
        f'exec {criu.path} "$@"\n'
    )
    script.chmod(0o755)
    env = {**os.environ, "COLDFRAME_CRIU": str(script)}
    with starting("front", order(stored, tmp_path), "1", env=env) as front:
        until(hangs.exists)
        below = psutil.Process(front.pid).children(recursive=True)
        assert len(below) >= 3  # the restorer, a PID 1, the script
        front.kill()
        until(lambda: all(gone(process.pid) for process in below))


def test_a_restorer_that_is_killed_takes_its_clones_along(stored: Stored, tmp_path: Path) -> None:
    before = mounts(tmp_path)
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
    clones = [ask_for(cloner, f"clone-{number}") for number in range(2)]
    assert [event(cloner).error for _ in range(3)] == [None] * 3
    pids = [child.pid for child, _ in clones]
    inits = [psutil.Process(pid).ppid() for pid in pids]
    os.kill(restorer_of(cloner), signal.SIGKILL)
    told = [event(cloner) for _ in clones]
    assert {name for name, _ in told} == {"clone-0", "clone-1"}
    assert all("is gone" in str(error) for _, error in told)
    assert cloner.closed
    assert [child.poll() for child, _ in clones] == [-9, -9]
    until(lambda: all(gone(pid) for pid in (*pids, *inits)))
    for _, control in clones:
        assert control.recv(5) is None
        control.close()
    assert mounts(tmp_path) == before


def test_a_pid_1_that_is_killed_takes_its_clone_along(stored: Stored, tmp_path: Path) -> None:
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
    (one, control), (other, second) = ask_for(cloner, "one"), ask_for(cloner, "other")
    assert [event(cloner).error for _ in range(3)] == [None] * 3
    os.kill(psutil.Process(one.pid).ppid(), signal.SIGKILL)
    assert one.wait() == -9
    assert gone(one.pid)
    assert control.recv(5) is None
    assert ask(second, "state") == 41
    control.close()
    second.close()
    assert other.wait() == 0
    cloner.close()


def test_signals_of_the_terminal_do_not_end_it(stored: Stored, tmp_path: Path) -> None:
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
    assert event(cloner).error is None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(restorer_of(cloner), number)
    child, control = ask_for(cloner, "clone")
    assert event(cloner).error is None
    control.close()
    assert child.wait() == 0
    cloner.close()


# -- refused -------------------------------------------------------------------------------------


def refusal(cloner: Cloner) -> ColdframeError:
    """Why there are no clones; whoever asks for one nevertheless hears the same."""
    error = event(cloner).error
    assert error is not None
    assert cloner.error is error
    child, control = ask_for(cloner, "clone")
    assert event(cloner) == ("clone", error)
    assert child.wait() == 1
    control.close()
    cloner.close()
    return error


def test_a_store_without_an_image_that_fits(criu: Criu, tmp_path: Path) -> None:
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(tmp_path / "store", None, tmp_path))
    error = refusal(cloner)
    assert isinstance(error, NoImage)
    assert "no image of this model" in str(error)
    assert not (tmp_path / "clones").exists()


def test_another_coldframe_than_that_of_who_asks(stored: Stored, tmp_path: Path) -> None:
    cloner = Cloner.spawn_restorer()
    asked = wanted(stored.store, stored.manifest, tmp_path)
    cloner.prepare({**asked, "sources": "0123456789abcdef"})
    error = refusal(cloner)
    assert isinstance(error, SnapshotError)
    assert "another coldframe" in str(error)
    assert "0123456789abcdef" in str(error)


def test_no_criu(stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDFRAME_CRIU", str(tmp_path / "none"))
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
    error = refusal(cloner)
    assert isinstance(error, SnapshotError)
    assert f"{tmp_path}/none does not run" in str(error)


def test_a_place_that_cannot_be_written(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "clones").touch()
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(stored.store, stored.manifest, tmp_path))
    assert isinstance(refusal(cloner), PlatformError)


def test_a_changed_image_is_refused_before_it_runs(stored: Stored, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(stored.store, store)
    largest = max((store / "objects").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    cloner = Cloner.spawn_restorer()
    cloner.prepare(wanted(store, None, tmp_path))
    children, controls = zip(*(ask_for(cloner, f"clone-{n}") for n in range(2)), strict=True)
    told = [event(cloner) for _ in range(3)]
    assert isinstance(told[0].error, SnapshotError)
    assert largest.name in str(told[0].error)
    # Those that had been begun while it was read have not come to run a byte of it.
    for child, control in zip(children, controls, strict=True):
        assert child.wait() == 1
        assert control.recv(5) is None
        control.close()
    assert psutil.Process(restorer_of(cloner)).children() == []
    cloner.close()


# -- privileges ----------------------------------------------------------------------------------


def allowed(prefix: list[str]) -> None:
    done = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    if done.returncode != 0:
        unavailable(f"{prefix[0]} cannot be used here: {done.stderr.decode()}")


def test_without_privileges_it_says_so(stored: Stored, tmp_path: Path) -> None:
    under = [*NO_NAMESPACES, *NO_ADMIN]
    allowed(under)
    with running("front", order(stored, tmp_path), "1", under=under) as (_, report):
        (_, told), (name, again) = report["errors"]
        error = ColdframeError.from_wire(told)
        assert isinstance(error, PlatformError)
        assert error.what == "this process may not have mounts of its own"
        assert "in a user namespace: No space left on device" in str(error.got)
        assert "user namespaces" in str(error.hint)
        assert (name, again) == ("clone-0", told)


@pytest.mark.parametrize(
    "under",
    [
        pytest.param(NO_ADMIN, id="it-takes-a-user-namespace"),
        pytest.param(["unshare", "--user", "--map-root-user"], id="it-is-in-one"),
    ],
)
def test_in_a_user_namespace(stored: Stored, tmp_path: Path, under: list[str]) -> None:
    allowed(under)
    before = mounts(tmp_path)
    with running("front", order(stored, tmp_path), "2", under=under) as (front, report):
        assert report["errors"] == []
        assert [value[:2] for value in report["values"]] == [[41, 1000]] * 2
        for pid in report["clones"]:
            users = [Path(f"/proc/{of}/ns/user").readlink() for of in (pid, "self")]
            assert users[0] != users[1]
        front.kill()
        for pid in (report["restorer"], *report["clones"]):
            until(lambda pid=pid: gone(pid))  # type: ignore[misc]
    assert mounts(tmp_path) == before


def test_behind_a_damaged_image_a_user_namespace_takes_a_whole_one(image: Image) -> None:
    """The store is root's: a stranger's, for who is in there when the second one is chosen."""
    user = "1234"
    if os.geteuid() != 0:
        unavailable("it takes root to be two users")
    allowed(["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "unshare", "--user"])
    with tempfile.TemporaryDirectory(prefix="cf-") as folder:  # pytest's own is for root alone
        place = Path(folder)
        place.chmod(0o755)
        store, work = place / "store", place / "work"
        # The user need not be able to read this interpreter's files.
        without = image._replace(said={**image.said, "libraries": []})
        whole = without.stored(store)
        damaged = without.stored(store, compress="none")
        assert damaged.created > whole.created  # so that it is tried first
        work.mkdir()
        os.chown(work, int(user), int(user))
        for path in (store, *store.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        shared = {each.digest for each in whole.objects}
        spoil(store, {each.digest for each in damaged.objects} - shared)
        asked = json.dumps(wanted(store, None, work))
        with running("choose_as", user, asked) as (_, told):
            assert told == {"id": whole.id}
        # Where none is whole, that is what is said.
        spoil(store, shared)
        with running("choose_as", user, asked) as (_, told):
            error = ColdframeError.from_wire(told["error"])
            assert isinstance(error, NoImage)
            assert error.what == "no image is whole"


def spoil(store: Path, digests: set[str]) -> None:
    """The largest of these objects is another one than its name says."""
    paths = [store / "objects" / digest for digest in digests]
    largest = max(paths, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


@pytest.mark.parametrize("under", [NO_ADMIN, ["unshare", "--user", "--map-root-user"]])
def test_an_image_made_in_a_user_namespace(criu: Any, tmp_path: Path, under: list[str]) -> None:
    allowed(under)
    with running("freeze_one", str(tmp_path / "frozen"), under=under) as (_, said):
        assert "error" not in said
    args = (criu.path, str(tmp_path / "frozen"), str(said["pid"]), str(said["control_inode"]))
    with running("clone_one", *args, str(tmp_path), under=under) as (_, told):
        assert told["value"][0] == 41
        assert told["status"] == 0
