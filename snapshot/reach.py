"""Whether one process may move another's context, as far as the kernel decides that.

To take hold of a process of another user, or of one with more rights, takes CAP_SYS_PTRACE. A
driver that is refused so says it when the process is warm; this is known before there is one.
"""

from __future__ import annotations

import os

from coldframe.loader.errors import NoCheckpoint
from coldframe.snapshot.identity import Identity

__all__ = ["check_reach", "may_reach_others"]

_CAP_SYS_PTRACE = 19


def check_reach(helper: int, identity: Identity) -> None:
    """Whether a helper may move contexts of processes that run as a user.

    Args:
        helper: Its PID.
        identity: The user, as numbered here.

    Raises:
        NoCheckpoint: It may not, or is gone.
    """
    try:
        user, rights = _rights(helper)
    except OSError as error:
        raise NoCheckpoint(
            "who moves contexts is gone", where=f"process {helper}", got=error.strerror, hint=""
        ) from error
    if user != identity.uid and not rights >> _CAP_SYS_PTRACE & 1:
        raise NoCheckpoint(
            "the memory service may not reach workers of another user",
            where=f"process {helper}",
            expected=f"CAP_SYS_PTRACE, or user {identity.uid}",
            got=f"user {user} without it",
            hint="Give the container CAP_SYS_PTRACE, or run workers as the replica's own user.",
        )


def may_reach_others() -> bool:
    """Whether this process may take hold of other users' processes."""
    return bool(_rights(os.getpid())[1] >> _CAP_SYS_PTRACE & 1)


def _rights(pid: int) -> tuple[int, int]:
    """A process's effective user and capabilities."""
    user = rights = 0
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == "Uid":
                user = int(value.split()[1])
            elif name == "CapEff":
                rights = int(value, 16)
    return user, rights
