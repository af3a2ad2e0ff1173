"""Processes that give up their rights, as the kernel sees them afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import drop
from tests.snapshot.frozen import frozen
from tests.support import unavailable

NOBODY = Identity(65534, 65534, (65533, 12))

BECOME_NOBODY = "os.setgroups([12]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)"

SCRIPT = """
import ctypes, json, os, sys
from coldframe.loader.errors import PlatformError
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import drop
libc = ctypes.CDLL(None, use_errno=True)
uid, gid, groups, namespace = json.loads(sys.argv[1])
first = {first!r}
exec(first)
try:
    drop(Identity(uid, gid, tuple(groups), namespace))
except PlatformError as error:
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
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import drop
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


# -- in two steps, with threads in between --------------------------------------------------------

STEPS = """
import ctypes, json, os, subprocess, sys, threading
from coldframe.loader.errors import PlatformError
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import become, confine
libc = ctypes.CDLL(None)
user = Identity(*json.loads(sys.argv[1]))
done = threading.Event()
def rights(which="thread-self"):
    names = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
    lines = dict(line.split(":", 1) for line in open(f"/proc/{which}/status"))
    return [lines[name].split() for name in names]
try:
    FIRST
    libc.prctl(1, 15, 0, 0, 0)  # it is to die with its parent
    threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = open("/etc/shadow").read() != ""
    become(user)
    later = threading.Thread(target=done.wait, daemon=True)
    later.start()
    dies_by = ctypes.c_int()
    libc.prctl(2, ctypes.byref(dies_by), 0, 0, 0)
    every = [rights(f"self/task/{thread}") for thread in os.listdir("/proc/self/task")]
    grep = ["grep", "-E", "^(Uid|Cap|NoNew)", "/proc/self/status"]
    ran = subprocess.check_output(grep, text=True)
    print(json.dumps({"every": every, "before": before, "dies_by": dies_by.value, "ran": ran,
                      "dumpable": libc.prctl(3, 0, 0, 0, 0)}))
except PlatformError as error:
    print(json.dumps(str(error)))
"""


def stepped(first: str, user: Identity = NOBODY) -> object:
    """What all threads of a process are after both steps; what it said if they could not be."""
    arguments = json.dumps([user.uid, user.gid, user.groups])
    script = STEPS.replace("FIRST", first)
    done = subprocess.run(
        [sys.executable, "-c", script, arguments], capture_output=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("first", "user"),
    [
        ("confine()", NOBODY),
        ("confine(user)", NOBODY),
        ("confine(user)", Identity(0, 0, ())),
        ("confine(user)", Identity(0, 12, (65533,))),
    ],
)
def test_threads_that_were_there_have_nothing_left_either(first: str, user: Identity) -> None:
    result = stepped(first, user)
    assert isinstance(result, dict), result
    none = ["0" * 16]
    groups = [str(group) for group in sorted(user.groups)]
    ids = [[str(user.uid)] * 4, [str(user.gid)] * 4, groups]
    assert result["every"] == [[*ids, *[none] * 5, ["1"]]] * 5
    assert result["before"] is True
    assert (result["dies_by"], result["dumpable"]) == (15, 1)
    status = dict(line.split(":\t") for line in result["ran"].splitlines())
    assert status.pop("NoNewPrivs") == "1"
    assert status.pop("Uid").split() == [str(user.uid)] * 4
    assert set(status.values()) == {"0" * 16}


@pytest.mark.usefixtures("as_root")
def test_rights_that_a_thread_has_left_are_an_error() -> None:
    assert "is not what it should be" in str(stepped("pass"))
    # The kernel takes nothing from root that stays root, and each thread has its own.
    assert "is not what it should be" in str(stepped("confine()", Identity(0, 0, ())))


@pytest.mark.usefixtures("as_root")
def test_the_first_step_is_for_one_thread() -> None:
    first = "threading.Thread(target=done.wait, daemon=True).start(); confine()"
    assert "by one thread only" in str(stepped(first))


@pytest.mark.usefixtures("as_root")
def test_who_may_not_become_another_is_told() -> None:
    assert "cannot set the groups" in str(stepped(f"{BECOME_NOBODY}; confine(user)"))


# -- with threads of others', which start with what there is -------------------------------------


NARROWED = "from coldframe.snapshot.privileges import narrow; narrow()"


def narrowed(user: Identity, first: str = NARROWED) -> object:
    """As `stepped`, where a worker is frozen with a driver's threads in it."""
    return stepped(
        f"{first}; become = __import__('functools').partial(become, narrowed=True)", user
    )


@pytest.mark.usefixtures("as_root")
def test_who_leaves_root_leaves_nothing_to_threads_of_others() -> None:
    result = narrowed(NOBODY)
    assert isinstance(result, dict), result
    groups = [str(group) for group in sorted(NOBODY.groups)]
    ids = [[str(NOBODY.uid)] * 4, [str(NOBODY.gid)] * 4, groups]
    assert result["every"] == [[*ids, *[["0" * 16]] * 5, ["1"]]] * 5
    assert (result["dies_by"], result["dumpable"]) == (15, 1)


@pytest.mark.usefixtures("as_root")
def test_who_stays_root_leaves_them_a_change_of_user_and_nothing_else() -> None:
    result = narrowed(Identity(0, 0, ()))
    assert isinstance(result, dict), result
    none, change = ["0" * 16], [f"{1 << 6 | 1 << 7:016x}"]
    ids = [["0"] * 4, ["0"] * 4, []]
    clean = [*ids, *[none] * 5, ["1"]]
    # In /proc's order: inheritable, permitted, effective, bounding, ambient.
    left = [*ids, none, change, change, none, none, ["1"]]
    every = sorted(result["every"])
    assert every == sorted([clean, clean, left, left, left])  # this one, and what it has started
    # What is run has none of that, whoever runs it.
    assert {line.split(":\t")[1] for line in result["ran"].splitlines() if "Cap" in line} == {
        "0" * 16
    }


@pytest.mark.usefixtures("as_root")
def test_threads_that_were_not_narrowed_are_an_error() -> None:
    assert "is not what it should be" in str(narrowed(Identity(0, 0, ()), "pass"))
    assert "is not what it should be" in str(narrowed(NOBODY, "pass"))


def test_it_is_narrowed_by_one_thread() -> None:
    first = "threading.Thread(target=done.wait, daemon=True).start()"
    assert "by one thread only" in str(stepped(f"{first}; {NARROWED}"))


def test_this_test_process_was_not_touched() -> None:
    assert drop.__module__ == "coldframe.snapshot.privileges"
    with open("/proc/self/status") as file:
        assert "NoNewPrivs:\t0" in file.read()


ENDING = """
import os, threading
from coldframe.loader.errors import PlatformError
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import become, confine
who = Identity(65534, 65534, (12,))
confine(who)
for _ in range(100):
    child = os.fork()
    if not child:
        for _ in range(8):
            threading.Thread(target=lambda: None).start()
        try:
            become(who)
        except PlatformError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.usefixtures("as_root")
def test_a_thread_that_is_about_to_be_gone_is_none() -> None:
    # libc does not change the user of one that has run its last line.
    done = subprocess.run(
        [sys.executable, "-c", ENDING], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
