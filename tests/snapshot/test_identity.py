from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.identity import Identity, drop
from tests.snapshot.frozen import frozen
from tests.support import unavailable

NOBODY = Identity(65534, 65534, (65533, 12))

BECOME_NOBODY = "os.setgroups([12]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)"

SCRIPT = """
import ctypes, json, os, sys
from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.identity import Identity, drop
libc = ctypes.CDLL(None, use_errno=True)
uid, gid, groups, namespace = json.loads(sys.argv[1])
first = {first!r}
exec(first)
try:
    drop(Identity(uid, gid, tuple(groups), namespace))
except SnapshotError as error:
    print(json.dumps(str(error)))
    sys.exit()
lines = open("/proc/self/status").read().splitlines()
status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
def tried(call):
    try:
        call()
    except PermissionError:
        return False
    return True
print(json.dumps({{
    "status": {{k: v.split() for k, v in status.items()}},
    "setuid": tried(lambda: os.setuid(0)),
    "shadow": tried(lambda: open("/etc/shadow").close()),
    "maps": tried(lambda: open("/proc/self/maps").close()),
    "mount": tried(lambda: os.chroot("/")),
    "dumpable": libc.prctl(3, 0, 0, 0, 0),
}}))
"""


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        unavailable("dropping privileges wants some")


def dropped(identity: Identity, first: str = "") -> object:
    """What a process of its own is after dropping to an identity; what it said if it could not."""
    script = SCRIPT.format(first=first)
    arguments = json.dumps([identity.uid, identity.gid, list(identity.groups), identity.namespace])
    done = subprocess.run(
        [sys.executable, "-c", script, arguments], capture_output=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


def capabilities(status: dict[str, list[str]], *names: str) -> set[int]:
    return {int(status[f"Cap{name}"][0], 16) for name in names}


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("identity", [NOBODY, Identity(65534, 0, ()), Identity(0, 0, (0,))])
def test_nothing_is_left(identity: Identity) -> None:
    result = dropped(identity)
    assert isinstance(result, dict), result
    status = result["status"]
    assert status["Uid"] == [str(identity.uid)] * 4
    assert status["Gid"] == [str(identity.gid)] * 4
    assert {int(group) for group in status["Groups"]} == set(identity.groups)
    assert capabilities(status, "Inh", "Prm", "Eff", "Bnd", "Amb") == {0}
    assert status["NoNewPrivs"] == ["1"]
    assert result["mount"] is False
    assert result["maps"] is True
    assert result["dumpable"] == 1
    if identity == NOBODY:
        assert result["setuid"] is False
        assert result["shadow"] is False


@pytest.mark.usefixtures("as_root")
def test_a_program_that_is_run_gains_nothing() -> None:
    run = "import subprocess; print(subprocess.check_output(['grep', '-E', 'Cap|NoNew', "
    run += "'/proc/self/status'], text=True))"
    script = f"""
from coldframe.snapshot.identity import Identity, drop
drop(Identity(0, 0, ()))
{run}
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, timeout=60, text=True
    )
    status = dict(line.split(":\t") for line in done.stdout.splitlines() if line)
    assert status.pop("NoNewPrivs") == "1"
    assert {int(value, 16) for value in status.values()} == {0}


@pytest.mark.usefixtures("as_root")
def test_who_has_no_privileges_keeps_what_it_is() -> None:
    first = (
        "os.setgroups([12]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)"
    )
    result = dropped(Identity(65534, 65534, (12,)), first)
    assert isinstance(result, dict), result
    assert capabilities(result["status"], "Inh", "Prm", "Eff", "Amb") == {0}
    # Without the capability for it the bounding set stays; there is nothing to be had from it.
    assert result["status"]["NoNewPrivs"] == ["1"]


@pytest.mark.usefixtures("as_root")
def test_who_has_no_privileges_becomes_nobody_else() -> None:
    assert "cannot become another user" in str(dropped(Identity(1000, 65534, (12,)), BECOME_NOBODY))
    assert "cannot set the groups" in str(dropped(Identity(65534, 65534, (7,)), BECOME_NOBODY))


NAMESPACE = """
libc.prctl(4, 1, 0, 0, 0)  # else /proc/self is not ours to write
if libc.unshare(0x10000000) != 0:
    print(json.dumps("no namespaces")); sys.exit()
for name, line in (("setgroups", "deny"), ("uid_map", "0 65534 1"), ("gid_map", "0 65534 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(line)
"""


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("outside", [False, True])
def test_in_a_user_namespace_groups_may_stay(outside: bool) -> None:
    here = os.stat("/proc/self/ns/user").st_ino
    # Either as the namespace numbers its one user, or as the one around it does.
    identity = Identity(65534, 65534, (12,), here) if outside else Identity(0, 0, ())
    result = dropped(identity, BECOME_NOBODY + NAMESPACE)
    if result == "no namespaces":
        unavailable("this machine has no user namespaces for everybody")
    assert isinstance(result, dict), result
    assert result["status"]["Uid"] == ["0"] * 4
    assert capabilities(result["status"], "Inh", "Prm", "Eff", "Bnd", "Amb") == {0}


@pytest.mark.usefixtures("as_root")
def test_a_user_who_is_not_in_the_namespace_is_not_become() -> None:
    stranger = Identity(1234, 1234, (), os.stat("/proc/self/ns/user").st_ino)
    result = dropped(stranger, BECOME_NOBODY + NAMESPACE)
    if result != "no namespaces":
        assert "not in this user namespace" in str(result)


def test_one_thread_only() -> None:
    first = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    me = Identity.current()
    assert "by one thread only" in str(dropped(me, first))


@pytest.mark.usefixtures("as_root")
def test_a_clone_is_the_fronts_user() -> None:
    with frozen("import os", "template") as process:
        clone = process.woken(identity=NOBODY)
        assert clone.value("[*os.getresuid(), *os.getresgid()]") == [65534] * 6
        other = process.woken(identity=Identity(1234, 1235, ()))
        assert other.value("[os.getuid(), os.getgid(), os.getgroups()]") == [1234, 1235, []]


def test_current_is_what_the_kernel_says() -> None:
    me = Identity.current()
    assert (me.uid, me.gid) == (os.getuid(), os.getgid())
    assert Identity.from_wire(json.loads(json.dumps(me.to_wire()))) == me


@pytest.mark.parametrize(
    "data",
    [None, {}, {"uid": "0", "gid": 0, "groups": []}, {"uid": 2**32 - 1, "gid": 0, "groups": []}],
)
def test_what_is_no_identity_is_refused(data: object) -> None:
    with pytest.raises(SnapshotError, match="identity"):
        Identity.from_wire(data)


def test_this_test_process_was_not_touched() -> None:
    assert drop.__module__ == "coldframe.snapshot.identity"
    with open("/proc/self/status") as file:
        assert "NoNewPrivs:\t0" in file.read()
