"""Namespaces, mounts and process attributes: the system calls that Python 3.11 has no names for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

from coldframe.loader.errors import PlatformError

__all__ = [
    "NEW_MOUNTS",
    "NEW_PIDS",
    "NEW_USER",
    "detach_mounts",
    "adopting_orphans",
    "die_with_parent",
    "in_user_namespace",
    "make_mounts_private",
    "mount_proc",
    "mount_tmpfs",
    "own_mounts",
    "protect_proc",
    "set_last_pid",
    "unshare",
]

NEW_MOUNTS = 0x00020000
NEW_USER = 0x10000000
NEW_PIDS = 0x20000000

# Each was seen to be asked for by CRIU's restore. In a user namespace of its own a process has all.
_NEEDED = {
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_TIME": 25,
}
_CAP_SETGID, _CAP_SETUID, _CAP_SETFCAP = 6, 7, 31  # the last one to map root
_IDS = (1 << 32) - 1  # numbers of users, and of groups
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND = 1 << 5, 1 << 12
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
# What containers have read-only: files here speak to the whole machine, and its root need not have
# a capability to write them.
_MACHINE_WIDE = ("sys", "sysrq-trigger", "irq", "bus", "fs")
_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37

_HINT = "Namespaces and mounts need CAP_SYS_ADMIN, or user namespaces that are allowed."


def unshare(flags: int) -> None:
    """Gives this process namespaces of its own; see unshare(2).

    Raises:
        PlatformError: It may not have them.
    """
    _call("unshare", flags, what="cannot make a namespace")


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Makes this process the parent of those whose own parent, a child of this one, ends."""
    before = ctypes.c_int()
    _call("prctl", _PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0, what="prctl failed")
    _call("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0, what="prctl failed")
    try:
        yield
    finally:
        _call("prctl", _PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0, what="prctl failed")


def own_mounts() -> bool:
    """Gives this process mounts of its own, in a user namespace of its own where it takes that.

    In such a namespace are all the users of the one around it, for clones to become one of them,
    where this is root and may say so; else root alone, who is this process's user.

    Returns:
        Whether it is in a user namespace now, be it this one or a container's.

    Raises:
        PlatformError: Neither is allowed.
    """
    try:
        _check_capable()
        unshare(NEW_MOUNTS)
    except PlatformError as refused:
        try:
            _enter_user_namespace()
        except PlatformError as error:
            raise PlatformError(
                "this process may not have mounts of its own",
                got=f"{refused.got}; and in a user namespace: {error.got}",
                hint=_HINT,
            ) from error
    make_mounts_private()
    return in_user_namespace()


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0 or not _may_map():
        unshare(NEW_USER | NEW_MOUNTS)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"0 {uid} 1")
        _write("/proc/self/gid_map", f"0 {gid} 1")
        return
    # Once in it, this process has no rights over the one around it, and another has to say this.
    maps = {kind: _all_of(kind) for kind in ("uid", "gid")}
    parent, (entered, entering) = os.getpid(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(entering)
            if os.read(entered, 1):
                for kind, text in maps.items():
                    _write(f"/proc/{parent}/{kind}_map", text)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(entered)
    try:
        unshare(NEW_USER | NEW_MOUNTS)
        os.write(entering, b".")
    finally:
        os.close(entering)
        _, status = os.waitpid(child, 0)
    if status != 0:
        raise PlatformError("the users of a namespace cannot be mapped", got=f"status {status}")


def _all_of(kind: str) -> str:
    """A map that gives all users, or groups, of this namespace the numbers that they have here."""
    with open(f"/proc/self/{kind}_map") as file:
        rows = [line.split() for line in file]
    # But for the last number of all, by which `in_user_namespace` tells the machine's own map.
    return "\n".join(f"{first} {first} {min(int(count), _IDS - 1)}" for first, _, count in rows)


def in_user_namespace() -> bool:
    """Whether root here is not the machine's root."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() != ["0", "0", str(_IDS)]


def make_mounts_private() -> None:
    """Has what is mounted here not spread to the rest of the system."""
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE, None)


def _check_capable() -> None:
    """Whether this process has all capabilities that a restore takes.

    Raises:
        PlatformError: It has not.
    """
    effective = _effective()
    missing = [name for name, number in _NEEDED.items() if not effective >> number & 1]
    if missing:
        raise PlatformError(
            "CRIU cannot restore a process here", got=f"no {', '.join(missing)}", hint=_HINT
        )


def _may_map() -> bool:
    """Whether this process may say whom a user namespace has."""
    effective = _effective()
    return all(effective >> number & 1 for number in (_CAP_SETGID, _CAP_SETUID, _CAP_SETFCAP))


def _effective() -> int:
    """The capabilities of this thread, a bit for each."""
    with open("/proc/thread-self/status") as file:
        found = next(line for line in file if line.startswith("CapEff:"))
    return int(found.split()[1], 16)


def mount_proc() -> None:
    """Mounts /proc anew, so that it shows this PID namespace."""
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)


def protect_proc() -> None:
    """Makes read-only what in /proc is the machine's, as a container's own /proc has it.

    Raises:
        PlatformError: The kernel refuses it for one of them; the others are.
    """
    flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    refused = None
    for path in (f"/proc/{name}" for name in _MACHINE_WIDE):
        if os.path.exists(path):
            try:
                _mount(path, path, None, _MS_BIND, None)
                _mount(None, path, None, flags, None)
            except PlatformError as error:
                refused = error
    if refused is not None:
        raise refused


def mount_tmpfs(path: str) -> None:
    """Mounts memory over a directory, for those who share this process's mounts alone.

    In huge pages where it can: a large file is written in a third of the time.
    """
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    try:
        _mount("tmpfs", path, "tmpfs", flags, "mode=0700,huge=within_size")
    except PlatformError:
        _mount("tmpfs", path, "tmpfs", flags, "mode=0700")


def detach_mounts(path: str) -> None:
    """Takes a mount away; what is open in it stays as long as it is open."""
    _call("umount2", os.fsencode(path), _MNT_DETACH, what="cannot unmount", where=path)


def set_last_pid(pid: int) -> None:
    """Has the next child in this PID namespace get the number after that."""
    _write("/proc/sys/kernel/ns_last_pid", str(pid))


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that started it ends."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0, what="prctl failed")


def _mount(
    source: str | None, path: str, kind: str | None, flags: int, options: str | None
) -> None:
    def encode(text: str | None) -> bytes | None:
        return None if text is None else os.fsencode(text)

    _call(
        "mount",
        *(encode(source), encode(path), encode(kind), ctypes.c_ulong(flags), encode(options)),
        what=f"cannot mount {kind}" if kind else "cannot change a mount",
        where=path,
    )


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as error:
        raise PlatformError(
            "the kernel refuses a setting", where=path, got=error.strerror
        ) from error


def _call(name: str, *args: object, what: str, where: str | None = None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        raise PlatformError(
            what,
            where=where,
            got=os.strerror(ctypes.get_errno()),
            hint=_HINT,
        )
