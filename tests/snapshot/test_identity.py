"""Users by name and number, and whom a service runs as."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys

import pytest

from coldframe.loader.errors import PlatformError, SnapshotError
from coldframe.snapshot.identity import Identity, service_identity
from tests.support import unavailable


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


# -- whom a service runs as -----------------------------------------------------------------------


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        unavailable("to become another user wants root")


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize(
    ("text", "uid", "gid"),
    [
        (None, 65532, 65532),
        ("", 65532, 65532),
        ("1234", 1234, 1234),
        ("1234:77", 1234, 77),
        ("nobody", pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid),
        ("nobody:77", pwd.getpwnam("nobody").pw_uid, 77),
        (f"{pwd.getpwnam('nobody').pw_uid}", *pwd.getpwnam("nobody")[2:4]),
        ("0:65532", 0, 65532),
    ],
)
def test_whom_root_may_be_told_to_be(text: str | None, uid: int, gid: int) -> None:
    found = service_identity(text)
    assert (found.uid, found.gid, found.groups) == (uid, gid, ())
    assert found.seen_here() == found


NOBODIES = (
    *(":", "-1", "no-such-user", "nobody:", "nobody:nogroup", "1:-1", "4294967295", "1:1:1"),
    *("9" * 5000, "1:" + "9" * 5000, "٣", "1 ", "a\0b", "\udcff"),
)


@pytest.mark.parametrize("text", NOBODIES)
def test_who_is_no_user(text: str) -> None:
    with pytest.raises(PlatformError, match="no such user"):
        service_identity(text)


WITHOUT = """
import ctypes, json, os, sys
from coldframe.loader.errors import PlatformError
from coldframe.snapshot.identity import service_identity
libc = ctypes.CDLL(None)
{first}
for text in (None, "0", "1234", "65534:65534"):
    try:
        found = service_identity(text)
        print(json.dumps([found.uid, found.gid]))
    except PlatformError as error:
        print(json.dumps(error.got))
"""


def told(first: str) -> list[object]:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(first=first)], capture_output=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.usefixtures("as_root")
def test_who_may_become_nobody_else_stays_who_it_is() -> None:
    nobody = "os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)"
    without = "user 65534 without CAP_KILL, CAP_SETGID, CAP_SETUID"
    assert told(nobody) == [[65534, 65534], without, without, [65534, 65534]]


@pytest.mark.usefixtures("as_root")
def test_root_that_may_not_end_others_stays_root() -> None:
    low = 0xFFFFFFFF & ~(1 << 5)
    unable = "header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)"
    unable += f"({low} & (1 << 6 | 1 << 7), {low} & (1 << 6 | 1 << 7))\n"
    unable += "assert libc.capset(header, data) == 0"
    without = "user 0 without CAP_KILL"
    assert told(unable) == [[0, 0], [0, 0], without, without]


@pytest.mark.usefixtures("as_root")
def test_a_user_namespace_without_others() -> None:
    alone = """if libc.unshare(0x10000000) != 0:
    print('"no namespaces"'); sys.exit()
for name, line in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
    with open(f"/proc/self/{name}", "w") as file:
        file.write(line)
"""
    found = told(alone)
    if found == ["no namespaces"]:
        unavailable("this machine has no user namespaces")
    missing = ["uid 1234 is not in this user namespace", "uid 65534 is not in this user namespace"]
    assert found == [[0, 0], [0, 0], *missing]
