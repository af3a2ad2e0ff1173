"""Whose process a clone is: restored with privileges, it gives them up before it does anything.

CRIU restores with the rights of whoever made the image. A clone that has dropped its own can open,
signal and trace what a fresh worker of the given user could, and less: no capability is left to
it, nor a way to get one back by running a program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coldframe.loader.errors import SnapshotError

if TYPE_CHECKING:
    import ctypes

__all__ = ["Identity", "drop", "shed"]

_PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP = 6, 7, 8
_KEPT = (_CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP)
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h: two words of 32 capabilities each
_WHOLE_RANGE = 1 << 32


@dataclass(frozen=True, slots=True)
class Identity:
    """A user as the kernel knows it.

    Args:
        uid: User id.
        gid: Group id.
        groups: Supplementary group ids.
        namespace: The user namespace that these numbers are of; 0 for that of whoever drops to it.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]
    namespace: int = 0

    @staticmethod
    def current() -> Identity:
        """Whose process this is."""
        return Identity(os.geteuid(), os.getegid(), tuple(os.getgroups()), _user_namespace())

    def to_wire(self) -> dict[str, Any]:
        return {
            "uid": self.uid,
            "gid": self.gid,
            "groups": list(self.groups),
            "namespace": self.namespace,
        }

    def seen_here(self) -> Identity:
        """The same user, as this process's user namespace numbers it.

        A clone may live in a namespace that was made for it, with nobody in it but its user.

        Raises:
            SnapshotError: That user is not in this process's namespace.
        """
        here = _user_namespace()
        if self.namespace in (0, here):
            return self
        groups = (_mapped("gid", group) for group in self.groups)
        uid, gid = _mapped("uid", self.uid), _mapped("gid", self.gid)
        if uid is None or gid is None:
            raise _failure("the user is not in this user namespace", self, "no such id")
        return Identity(uid, gid, tuple(group for group in groups if group is not None), here)

    @staticmethod
    def from_wire(data: Any) -> Identity:
        """The identity in a message.

        Raises:
            SnapshotError: It is none.
        """
        if isinstance(data, Mapping):
            uid, gid, groups = data.get("uid"), data.get("gid"), data.get("groups")
            space = data.get("namespace", 0)
            if isinstance(groups, list) and all(_is_id(i) for i in (uid, gid, space, *groups)):
                return Identity(uid, gid, tuple(groups), space)  # type: ignore[arg-type]
        raise SnapshotError(
            "the identity for a clone is none",
            where="identity",
            expected="uid, gid and groups as whole numbers",
            got=repr(data),
            hint="Front and image must be of the same version of coldframe.",
        )


def drop(identity: Identity) -> None:
    """Makes this process somebody's, without capabilities, for good.

    The kernel forgets with it that this process is to die with its parent (PR_SET_PDEATHSIG), so
    ask for that afterwards.

    Args:
        identity: Whose it is to be; the user that it is already is fine, root too.

    Raises:
        SnapshotError: There are several threads, each of which has capabilities of its own; or
            the kernel refused, or did something else. The process must not go on then.
    """
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise _failure("privileges are dropped by one thread only", 1, len(threads))
    import ctypes  # not for the front, which only passes an identity on

    libc = ctypes.CDLL(None, use_errno=True)
    # First, for this needs a capability that is gone with the user id.
    bounded = bool(_status()["CapEff"] >> _CAP_SETPCAP & 1)
    capability = 0
    while libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if bounded:
            _call(libc, "prctl(PR_CAPBSET_DROP)", libc.prctl, _PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
    identity = identity.seen_here()
    mapped_groups = _set_groups(identity.groups)
    try:
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as error:
        raise _failure("cannot become another user", identity, error.strerror) from error
    # Old kernels have no ambient set, and then there is nothing to clear.
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    _call(libc, "capset", libc.capset, header, nothing)
    _call(libc, "prctl(PR_SET_NO_NEW_PRIVS)", libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # The change of user took it away. A fresh worker has it: its own user may trace it, and the
    # front may read how much memory it uses.
    _call(libc, "prctl(PR_SET_DUMPABLE)", libc.prctl, _PR_SET_DUMPABLE, 1, 0, 0, 0)
    _verify(identity, bounded=bounded, mapped_groups=mapped_groups)


def shed() -> None:
    """Gives up all capabilities but those that `drop` needs, for a process that is to be frozen.

    CRIU gives a clone the capabilities that its image has, and can give no others than it has
    itself: the fewer there are in the image, the fewer a container needs to restore it.

    Raises:
        SnapshotError: The kernel refused.
    """
    import ctypes  # not for the front, which only passes an identity on

    libc = ctypes.CDLL(None, use_errno=True)
    kept = sum(1 << capability for capability in _KEPT) & _status()["CapPrm"]
    capability = 0
    while libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if kept >> _CAP_SETPCAP & 1 and not kept >> capability & 1:
            _call(libc, "prctl(PR_CAPBSET_DROP)", libc.prctl, _PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    _call(libc, "capset", libc.capset, header, data)


def _set_groups(groups: tuple[int, ...]) -> bool:
    """Sets the supplementary groups; whether that could be done."""
    if set(os.getgroups()) == set(groups):
        return True
    try:
        os.setgroups(groups)
    except OSError as error:
        # A user namespace made without privileges may not drop groups, which can also deny.
        if _in_user_namespace():
            return False
        raise _failure("cannot set the groups", groups, error.strerror) from error
    return True


def _user_namespace() -> int:
    """Identifies this process's user namespace; 0 on a kernel that has none."""
    try:
        return os.stat("/proc/self/ns/user").st_ino
    except OSError:
        return 0


def _mapped(kind: str, outside: int) -> int | None:
    """What a `uid` or `gid` of the namespace around this one is in this one."""
    with open(f"/proc/self/{kind}_map") as file:
        for line in file:
            inside, first, count = (int(field) for field in line.split())
            if first <= outside < first + count:
                return inside + outside - first
    return None


def _in_user_namespace() -> bool:
    with open("/proc/self/uid_map") as file:
        ranges = [[int(field) for field in line.split()] for line in file]
    return ranges != [[0, 0, _WHOLE_RANGE - 1]]


def _verify(identity: Identity, *, bounded: bool, mapped_groups: bool) -> None:
    status = _status()
    wanted: dict[str, object] = {
        "Uid": [identity.uid] * 4,
        "Gid": [identity.gid] * 4,
        "NoNewPrivs": 1,
        **dict.fromkeys(["CapInh", "CapPrm", "CapEff", "CapAmb"], 0),
    }
    if bounded:
        wanted["CapBnd"] = 0
    if mapped_groups:
        wanted["Groups"] = sorted(set(identity.groups))
    for field, expected in wanted.items():
        if status.get(field, 0) != expected:
            raise _failure(f"{field} is not what it should be", expected, status.get(field))


def _status() -> dict[str, Any]:
    """What the kernel says of this thread's rights."""
    found: dict[str, Any] = {}
    with open("/proc/thread-self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("Uid", "Gid"):
                found[name] = [int(field) for field in value.split()]
            elif name == "Groups":
                found[name] = sorted({int(field) for field in value.split()})
            elif name.startswith("Cap"):
                found[name] = int(value, 16)
            elif name == "NoNewPrivs":
                found[name] = int(value)
    return found


def _call(libc: ctypes.CDLL, name: str, function: Callable[..., int], *args: object) -> None:
    if function(*args) != 0:
        import ctypes

        raise _failure(f"{name} failed", 0, os.strerror(ctypes.get_errno()))


def _is_id(value: object) -> bool:
    # The last one means "leave it as it is" to the kernel.
    return type(value) is int and 0 <= value < _WHOLE_RANGE - 1


def _failure(what: str, expected: object, got: object) -> SnapshotError:
    return SnapshotError(
        what,
        where="dropping privileges",
        expected=expected,
        got=got,
        hint="The worker starts fresh instead.",
    )
