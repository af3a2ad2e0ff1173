"""Whose process it is: a user as the kernel numbers it, here and in other user namespaces.

How a process becomes somebody's, and gives up its rights, is told in `privileges`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import PlatformError, SnapshotError

__all__ = ["Identity", "service_identity"]

_WHOLE_RANGE = 1 << 32
_NONROOT = 65532
"""Whom images of containers have for those who need no rights, distroless's for one."""
# To become another user, and to end a process that has.
_NEEDED = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}


@dataclass(frozen=True, slots=True)
class Identity:
    """A user as the kernel knows it.

    Args:
        uid: User id.
        gid: Group id.
        groups: Supplementary group ids.
        namespace: The user namespace that these numbers are of; 0 for that of whoever becomes it.
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
            PlatformError: That user is not in this process's namespace.
        """
        here = _user_namespace()
        if self.namespace in (0, here):
            return self
        groups = (_mapped("gid", group) for group in self.groups)
        uid, gid = _mapped("uid", self.uid), _mapped("gid", self.gid)
        if uid is None or gid is None:
            raise PlatformError(
                "the user is not in this user namespace", expected=self, got="no such id"
            )
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
            "the identity for a process is none",
            where="identity",
            expected="uid, gid and groups as whole numbers",
            got=repr(data),
            hint="Front and image must be of the same version of coldframe.",
        )


def service_identity(text: str | None) -> Identity:
    """Whom the processes of a service that faces a network run as.

    Args:
        text: `UID[:GID]` or the name of a user; None takes one without rights where this process
            may become another user, and else whoever it is. Without a GID a user's own group is
            taken, or the one of the same number. Supplementary groups are none.

    Returns:
        The user, in this process's user namespace. It is this process's own where there is no
        other to become; then there are still capabilities to give up.

    Raises:
        PlatformError: There is no such user, or this process may not become it.
    """
    here = Identity.current()
    if not text:  # an empty variable, as where a platform sets all that it knows
        wanted = Identity(_NONROOT, _NONROOT, (), here.namespace)
        return wanted if here.uid == 0 and _obstacle(wanted) is None else here
    uid, gid = _parsed(text)
    if (uid, gid) == (here.uid, here.gid):
        return here
    wanted = Identity(uid, gid, (), here.namespace)
    obstacle = _obstacle(wanted)
    if obstacle is not None:
        raise PlatformError(
            "this process may not become that user",
            where=text,
            got=obstacle,
            hint="Start it as root with CAP_SETUID, CAP_SETGID and CAP_KILL, or as that user.",
        )
    return wanted


def _parsed(text: str) -> tuple[int, int]:
    """User and group id of `UID[:GID]` or `NAME[:GID]`."""
    import pwd  # not for clones, which are told numbers

    user, colon, group = text.partition(":")
    try:
        if not (user.isascii() and user.isdigit()):
            entry = pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
        else:
            uid = gid = int(user)
            if not colon and _is_id(uid):
                with contextlib.suppress(KeyError):  # containers often have no names
                    gid = pwd.getpwuid(uid).pw_gid
        if colon:
            gid = int(group) if group.isascii() and group.isdigit() else -1
    except (KeyError, ValueError):
        uid = gid = -1
    if not (_is_id(uid) and _is_id(gid)):
        raise PlatformError(
            "there is no such user",
            where=text,
            expected=f"UID, UID:GID or a name that is known here; ids below {_WHOLE_RANGE - 1}",
            hint="Give numbers, as in 65532:65532.",
        )
    return uid, gid


def _obstacle(wanted: Identity) -> str | None:
    """Why this process may not become a user."""
    with open("/proc/thread-self/status") as file:
        found = next(line for line in file if line.startswith("CapEff:"))
    effective = int(found.split()[1], 16)
    missing = [name for name, number in _NEEDED.items() if not effective >> number & 1]
    if missing:
        return f"user {os.geteuid()} without {', '.join(missing)}"
    for kind, number in (("uid", wanted.uid), ("gid", wanted.gid)):
        if not any(inside <= number < inside + count for inside, _, count in _map(kind)):
            return f"{kind} {number} is not in this user namespace"
    return None


def _user_namespace() -> int:
    """Identifies this process's user namespace; 0 on a kernel that has none."""
    try:
        return os.stat("/proc/self/ns/user").st_ino
    except OSError:
        return 0


def _mapped(kind: str, outside: int) -> int | None:
    """What a `uid` or `gid` of the namespace around this one is in this one."""
    for inside, first, count in _map(kind):
        if first <= outside < first + count:
            return inside + outside - first
    return None


def _map(kind: str) -> list[tuple[int, int, int]]:
    """The ranges of a user namespace: the first id inside, the same outside, how many."""
    with open(f"/proc/self/{kind}_map") as file:
        rows = [[int(field) for field in line.split()] for line in file]
    return [(inside, outside, count) for inside, outside, count in rows]


def _is_id(value: object) -> bool:
    # The last one means "leave it as it is" to the kernel.
    return type(value) is int and 0 <= value < _WHOLE_RANGE - 1
