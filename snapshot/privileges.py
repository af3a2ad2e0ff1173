"""Giving up rights: a process becomes a user's, without capabilities, for good.

Capabilities, their bounding set and no_new_privs are each thread's own, and a thread starts with
those of whoever started it. User and groups libc sets for all threads at once, and from a thread
that is no longer root's the kernel takes what capabilities it has in effect. So there are two
steps for a process that first has to open what only root may: `confine` while it has one thread,
and `become` when it has all that it needs. A clone, which has one thread and needs nothing, takes
both at once (`drop`).

A worker on a GPU has threads of the driver's when it is frozen, and so has each clone of it. It
takes the first step before there is a driver (`narrow`), and a clone the second. Until then all its
threads keep what a change of user takes, since each of them changes; the kernel takes that from a
thread that leaves root. From one that stays root's nobody else can take it, so there the driver's
threads have those two capabilities left; ours has none.

What is left is less than any other process of that user has: there is no capability, nor a way to
get one back by running a program.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

from coldframe.loader.errors import PlatformError
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.linux import in_user_namespace

__all__ = ["become", "confine", "drop", "narrow", "shed"]

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2
_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_PR_CAPBSET_READ = 23
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAP_KILL, _CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP = 5, 6, 7, 8
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h: two words of 32 capabilities each
_LOW = (1 << 32) - 1
_ENDING_S = 5.0
"""How long a thread of a low priority may take from its last line to its end, in seconds."""
_CHANGE = 1 << _CAP_SETGID | 1 << _CAP_SETUID
"""What a thread needs to become another user's."""


def confine(to: Identity | None = None) -> None:
    """The first step: nothing that this process runs from now on has more rights than it has.

    It stays who it is and keeps its capabilities, to open what it needs.

    Args:
        to: Whose it will be, where that is known. Capabilities that the kernel will not take then,
            since the process is not root's or stays so, are given up now.

    Raises:
        PlatformError: There are several threads; or the kernel refused. The process must not go on.
    """
    _check_alone()
    libc = _libc()
    status = _status("self")
    bounded = _may(status, _CAP_SETPCAP)
    if bounded:
        _bound(libc, 0)
    if to is not None and not _leaves_root(to.seen_here(), status):
        _take_ids(libc, to.seen_here())
        _set_capabilities(libc, 0, 0)
    else:
        _set_capabilities(libc, status["CapPrm"], status["CapEff"])
    _call(libc, "prctl(PR_SET_NO_NEW_PRIVS)", libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _verify({"NoNewPrivs": 1, "CapInh": 0, "CapAmb": 0, **({"CapBnd": 0} if bounded else {})})


def narrow() -> None:
    """The first step for a process that is frozen with threads in it that are not ours.

    They start with what is left now: nothing but what a change of user takes, and that only where
    this is root's process, from whose threads the kernel takes it with the change.

    Raises:
        PlatformError: As `confine`.
    """
    _check_alone()
    libc = _libc()
    status = _status("self")
    bounded = _may(status, _CAP_SETPCAP)
    if bounded:
        _bound(libc, 0)
    kept = _CHANGE & status["CapPrm"] if status["Uid"][:3] == [0, 0, 0] else 0
    _set_capabilities(libc, kept, kept)
    _call(libc, "prctl(PR_SET_NO_NEW_PRIVS)", libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    rights = {"CapInh": 0, "CapPrm": kept, "CapEff": kept, "CapAmb": 0}
    _verify({"NoNewPrivs": 1, **rights, **({"CapBnd": 0} if bounded else {})})


def become(identity: Identity, *, narrowed: bool = False) -> None:
    """The second step: the process is that user's in all its threads, without capabilities.

    It is killed with its parent still, where it was to be and the caller is who asked for that.

    Args:
        identity: Whose it is to be; the user that it is already is fine, root too.
        narrowed: Whether `narrow` was the first step. Then other threads of a process that stays
            root's may have left what that has left them.

    Raises:
        PlatformError: The kernel refused, or some thread has rights left, as where `confine` was
            not called. The process must not go on.
    """
    libc = _libc()
    identity = identity.seen_here()
    bounded = _may(_status("thread-self"), _CAP_SETPCAP)
    mapped_groups = _take_ids(libc, identity)
    _set_capabilities(libc, 0, 0)
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
    _verify(wanted, spared=_CHANGE if narrowed and identity.uid == 0 else 0)


def drop(identity: Identity) -> None:
    """Both steps at once, for a process that has one thread.

    Args:
        identity: Whose it is to be; see `become`.

    Raises:
        PlatformError: As they do.
    """
    confine(identity)
    become(identity)


def shed(*, parent: bool = False) -> None:
    """Gives up all capabilities but those that `drop` needs, for a process that is to be frozen.

    CRIU gives a clone the capabilities that its image has, and can give no others than it has
    itself: the fewer there are in the image, the fewer a container needs to restore it.

    Args:
        parent: Whether clones are its children: then it needs to end those of other users.

    Raises:
        PlatformError: The kernel refused.
    """
    libc = _libc()
    needed = [_CAP_SETGID, _CAP_SETUID, _CAP_SETPCAP, *([_CAP_KILL] if parent else [])]
    kept = sum(1 << capability for capability in needed) & _status("self")["CapPrm"]
    if kept >> _CAP_SETPCAP & 1:
        _bound(libc, kept)
    _set_capabilities(libc, kept, kept)


def _check_alone() -> None:
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise _failure("privileges are dropped by one thread only", 1, len(threads))


def _leaves_root(to: Identity, status: dict[str, Any]) -> bool:
    """Whether the kernel will take all capabilities with the change of user."""
    return to.uid != 0 and 0 in status["Uid"][:3]


def _take_ids(libc: ctypes.CDLL, identity: Identity) -> bool:
    """Makes all threads the user's; whether the supplementary groups could be set too."""
    parent, dies_by = os.getppid(), _death_signal(libc)
    dumpable = libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    mapped_groups = _set_groups(identity.groups)
    try:
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except OSError as error:
        raise _failure("cannot become another user", identity, error.strerror) from error
    # The kernel takes both with a change of user. A process that was never another's has the
    # first: its user may trace it, and the front may read how much memory it uses.
    if dumpable == 1:
        _call(libc, "prctl(PR_SET_DUMPABLE)", libc.prctl, _PR_SET_DUMPABLE, 1, 0, 0, 0)
    if dies_by:
        _call(libc, "prctl(PR_SET_PDEATHSIG)", libc.prctl, _PR_SET_PDEATHSIG, dies_by, 0, 0, 0)
        if os.getppid() != parent:  # it has ended in between
            os._exit(1)
    return mapped_groups


def _set_groups(groups: tuple[int, ...]) -> bool:
    if set(os.getgroups()) == set(groups):
        return True
    try:
        os.setgroups(groups)
    except OSError as error:
        # A user namespace made without privileges may not drop groups, which can also deny.
        if in_user_namespace():
            return False
        raise _failure("cannot set the groups", groups, error.strerror) from error
    return True


def _bound(libc: ctypes.CDLL, kept: int) -> None:
    """Has no program give this thread a capability that is not among those; needs CAP_SETPCAP."""
    capability = 0
    while libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        if not kept >> capability & 1:
            _call(libc, "prctl(PR_CAPBSET_DROP)", libc.prctl, _PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1


def _set_capabilities(libc: ctypes.CDLL, permitted: int, effective: int) -> None:
    """Sets this thread's capabilities. None is inherited, by whatever it runs."""
    # Old kernels have no ambient set, and then there is nothing to clear.
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = ((effective >> s & _LOW, permitted >> s & _LOW, 0) for s in (0, 32))
    _call(libc, "capset", libc.capset, header, (ctypes.c_uint32 * 6)(*low, *high))


def _death_signal(libc: ctypes.CDLL) -> int:
    """The signal that the kernel sends when the parent ends; 0 for none."""
    number = ctypes.c_int()
    address = ctypes.byref(number)
    _call(libc, "prctl(PR_GET_PDEATHSIG)", libc.prctl, _PR_GET_PDEATHSIG, address, 0, 0, 0)
    return number.value


def _verify(wanted: dict[str, object], spared: int = 0) -> None:
    """Whether the kernel says the same of every thread.

    Args:
        wanted: What it is to say, by field.
        spared: Capabilities that other threads than this one may have.
    """
    own = os.path.basename(os.readlink("/proc/thread-self"))
    for thread in os.listdir("/proc/self/task"):
        deadline = time.monotonic() + _ENDING_S
        while (wrong := _wrong(thread, wanted, 0 if thread == own else spared)) is not None:
            # libc leaves a thread as it is that runs no code any more, and is about to be gone.
            if thread == own or time.monotonic() > deadline:
                field, expected, got = wrong
                raise _failure(f"{field} is not what it should be", expected, got)
            time.sleep(0.001)


def _wrong(
    thread: str, wanted: dict[str, object], spared: int
) -> tuple[str, object, object] | None:
    """A field of which the kernel says something else of a thread, what it should be and is."""
    try:
        status = _status(f"self/task/{thread}")
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return None
    status.update({name: status[name] & ~spared for name in ("CapPrm", "CapEff")})
    for field, expected in wanted.items():
        if status.get(field, 0) != expected:
            return field, expected, status.get(field)
    return None


def _may(status: dict[str, Any], capability: int) -> bool:
    return bool(status["CapEff"] >> capability & 1)


def _status(which: str) -> dict[str, Any]:
    """What the kernel says of a thread's rights."""
    found: dict[str, Any] = {}
    with open(f"/proc/{which}/status") as file:
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


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(libc: ctypes.CDLL, name: str, function: Callable[..., int], *args: object) -> None:
    if function(*args) != 0:
        raise _failure(f"{name} failed", 0, os.strerror(ctypes.get_errno()))


def _failure(what: str, expected: object, got: object) -> PlatformError:
    return PlatformError(
        what,
        where="dropping privileges",
        expected=expected,
        got=got,
        hint="Start it as another user, or as root with CAP_SETUID, CAP_SETGID and CAP_SETPCAP.",
    )
