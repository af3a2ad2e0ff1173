"""CRIU: found, asked whether it works here, and called to dump and restore one process.

CRIU (criu.org) writes a process's memory and state to files, and makes the process again from
them. It is a program, called as one; what it must be told for our worker is here.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass

from coldframe.loader.errors import PlatformError, SnapshotError
from coldframe.snapshot.linux import NEW_MOUNTS, make_mounts_private, mount_proc, unshare

__all__ = ["OLDEST", "Criu", "last_error"]

OLDEST = (4, 1)
"""Older ones do not know the layout of recent kernels' vDSO, among other things."""

_INSTALL = (
    "Install CRIU 4.1 or later (`make criu` does, from a checkout), or name one in COLDFRAME_CRIU."
)
_CHECK_S = 10.0
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


@dataclass(frozen=True, slots=True)
class Criu:
    """A CRIU that is new enough.

    Args:
        path: The program.
        version: Such as `4.1.1`.
    """

    path: str
    version: str

    @classmethod
    def find(cls) -> Criu:
        """The first that will do: COLDFRAME_CRIU, one on the PATH, the one of `make criu`.

        Raises:
            SnapshotError: There is none, or none that is new enough.
        """
        given = os.environ.get("COLDFRAME_CRIU")
        refused = []
        for path in [given] if given else _places():
            version = _version(path)
            if version is None:
                refused.append(f"{path} does not run")
            elif _number(version) < OLDEST:
                refused.append(f"{path} is {version}")
            else:
                return cls(path, version)
        raise SnapshotError(
            "there is no CRIU to use",
            expected=f"{OLDEST[0]}.{OLDEST[1]} or later",
            got=", ".join(refused) or "none",
            hint=_INSTALL,
        )

    def check(self, *, user: bool = False) -> None:
        """Asks it whether this kernel has what it needs, and this process what it takes.

        Where this is root it is asked as it will be called: with a /proc of its own. That of a
        container is read-only where CRIU says which number the next process gets.

        In a user namespace it says no for want of things that no worker has, such as open TCP
        connections, so there it is not asked: what it cannot do, it says when it comes to that.

        Args:
            user: Whether this is in a user namespace.

        Raises:
            SnapshotError: It says no, and why.
        """
        if user:
            return
        command = [self.path, "check", *([] if os.geteuid() == 0 else ["--unprivileged"])]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=_ENVIRONMENT,
                timeout=_CHECK_S,
                check=False,
                preexec_fn=_with_own_proc if os.geteuid() == 0 else None,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SnapshotError("CRIU cannot be asked", where=self.path, got=str(error)) from error
        if done.returncode != 0:
            log, text = (part.decode(errors="replace") for part in (done.stderr, done.stdout))
            # That it lacks a capability is no error in its log.
            said = " ".join(text.split()) if text.strip() else last_error(log)
            raise SnapshotError("CRIU does not work here", where=self.path, got=said)

    def dump_command(
        self, pid: int, images: str, log: str, control_inode: int, *, user: bool
    ) -> list[str]:
        """The command that freezes a process and ends it.

        Args:
            pid: Whom, in the PID namespace that the command runs in.
            images: The directory that gets the image.
            log: The file that gets CRIU's log; relative to that directory.
            control_inode: Of its control socket, whose other end stays outside.
            user: Whether this is in a user namespace.
        """
        return [
            *(self.path, "dump", "--no-default-config", "--tree", str(pid)),
            *("--images-dir", images, "--log-file", log, "-v2"),
            *("--external", f"unix[{control_inode}]"),
            *_no_plugins(images),
            *(["--unprivileged"] if user else []),
        ]

    def restore_command(
        self, images: str, work: str, control_inode: int, control_fd: int, *, user: bool
    ) -> list[str]:
        """The command that makes a clone, as a child of whoever runs the command.

        Args:
            images: The directory with the image.
            work: A directory for what CRIU writes meanwhile: `restore.log`.
            control_inode: Of the control socket when the process was frozen.
            control_fd: The inherited descriptor that the clone gets in its place.
            user: Whether this is in a user namespace.
        """
        return [
            *(self.path, "restore", "--no-default-config", "--restore-detached"),
            *("--restore-sibling", "--images-dir", images, "--work-dir", work),
            *("--log-file", "restore.log", "-v1"),
            *("--inherit-fd", f"fd[{control_fd}]:socket:[{control_inode}]"),
            *_no_plugins(work),
            *(["--unprivileged"] if user else []),
        ]


def _with_own_proc() -> None:
    """Between fork and exec: where it may not be, the program says itself what is missing."""
    with contextlib.suppress(PlatformError):
        unshare(NEW_MOUNTS)
        make_mounts_private()
        mount_proc()


def _no_plugins(folder: str) -> list[str]:
    """Has it look for plug-ins where there are none.

    One that is installed for GPUs would lock and checkpoint a context that is checkpointed, and
    restore it in the middle of CRIU's own restore, on the GPU that it was on.
    """
    return ["--libdir", folder]


def last_error(log: str) -> str:
    """What CRIU says went wrong: its first error, which is the cause of the others."""
    errors = re.findall(r"Error \([^)]*\): (.*)", log)
    told = [error for error in errors if not _HARMLESS.search(error)] or errors
    return told[0].strip() if told else (log.strip().splitlines() or ["nothing"])[-1]


_HARMLESS = re.compile(
    r"Unable to create tun|Can't setup RLIMIT_NOFILE|SO_SNDBUFFORCE|Unexpected error: -1"
)
"""What it calls an error and goes on from, without privileges."""


def _places() -> list[str]:
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    # Where packages put it, which is not on everybody's PATH.
    folders = dict.fromkeys([*path, "/usr/local/sbin", "/usr/sbin"])
    found = [os.path.join(folder, "criu") for folder in folders if folder]
    # A checkout's own, which knows nothing of this process's PATH.
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found.append(os.path.join(root, "build", "criu", "bin", "criu"))
    return [path for path in found if os.access(path, os.X_OK)]


def _version(path: str) -> str | None:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_ENVIRONMENT,
            timeout=_CHECK_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(rb"Version: (\d+(?:\.\d+)+)", done.stdout)
    return found[1].decode() if found else None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
