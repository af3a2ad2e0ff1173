"""Processes of a replica: started bare, tied to their parent's life, and their run directory."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Sequence

from coldframe.loader.errors import PlatformError
from coldframe.loader.timeline import now

__all__ = [
    "Child",
    "die_with_parent",
    "make_run_dir",
    "remove_run_dir",
    "spawn_python",
    "sweep_run_dirs",
]

_PR_SET_PDEATHSIG = 1
_INHERITED_FD = 3
_PREFIX = "coldframe-"


class Child:
    """A child process of ours.

    Args:
        pid: Its process id.
        spawned_ns: When it was started, CLOCK_MONOTONIC.
    """

    def __init__(self, pid: int, spawned_ns: int) -> None:
        self.pid = pid
        self.spawned_ns = spawned_ns
        self._status: int | None = None

    def wait(self) -> int:
        """Waits for its end: the exit code, or minus the signal that ended it."""
        if self._status is None:
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def poll(self) -> int | None:
        """The exit code where it has ended, else None."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def kill(self) -> int:
        """Ends it at once and reaps it: the exit code, as `wait`."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()


def spawn_python(code: str, args: Sequence[str], fd: int, env: dict[str, str]) -> Child:
    """Starts this interpreter on a line of code, with one inherited descriptor (number 3).

    Standard input is /dev/null, so that nothing steals the terminal's; standard output goes to
    standard error, so that an answer on it stays whole. The child is in a process group of its
    own: a Ctrl-C on the terminal reaches the parent alone.

    Args:
        code: Run with `first_ns` (its first instant) and `sys` at hand; it may not block on fd 0.
        args: `sys.argv[1:]` of the child.
        fd: What it inherits.
        env: Its environment.
    """
    prologue = "import time; first_ns = time.monotonic_ns(); import sys; "
    # -P: a module in the working directory must not stand in for one of ours.
    argv = [sys.executable, "-P", "-c", prologue + code, *args]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, 2, 1),
        (os.POSIX_SPAWN_DUP2, fd, _INHERITED_FD),
    ]
    # dup2 onto itself would leave the close-on-exec flag set.
    if fd == _INHERITED_FD:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
        actions[2] = (os.POSIX_SPAWN_DUP2, moved, _INHERITED_FD)
    else:
        moved = -1
    spawned = now()
    try:
        pid = os.posix_spawn(sys.executable, argv, env, file_actions=actions, setpgroup=0)
    except OSError as error:
        raise PlatformError(
            "cannot start a process", where=sys.executable, got=error.strerror
        ) from error
    finally:
        if moved >= 0:
            os.close(moved)
    return Child(pid, spawned)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends.

    Args:
        parent: The process that must be alive for this one to go on.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the call.
    if os.getppid() != parent:
        os._exit(1)


def make_run_dir(parent: str | None = None) -> tuple[str, int]:
    """A private directory for one replica's sockets.

    Args:
        parent: Where; by default XDG_RUNTIME_DIR, else the temporary directory.

    Returns:
        Its path and a descriptor whose lock says that it is in use (see `sweep_run_dirs`).

    Raises:
        PlatformError: It cannot be made.
    """
    base = parent or _run_base()
    path = os.path.join(base, f"{_PREFIX}{os.getuid()}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        os.mkdir(path, 0o700)
    except OSError as error:
        raise PlatformError(
            "cannot make the run directory",
            where=path,
            got=error.strerror,
            hint="Set COLDFRAME_RUN_DIR to a directory that can be written to.",
        ) from error
    return path, _lock(path)


def remove_run_dir(path: str) -> None:
    shutil.rmtree(path, ignore_errors=True)


def sweep_run_dirs(parent: str | None = None) -> list[str]:
    """Removes run directories of this user whose replicas are gone, all processes killed at once.

    Returns:
        What was removed.
    """
    base = parent or _run_base()
    removed = []
    for entry in os.scandir(base):
        if not entry.name.startswith(f"{_PREFIX}{os.getuid()}-") or not entry.is_dir():
            continue
        try:
            fd = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:  # somebody else swept it
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_run_dir(entry.path)
            removed.append(entry.path)
        except BlockingIOError:  # in use
            pass
        finally:
            os.close(fd)
    return removed


def _run_base() -> str:
    for name in ("COLDFRAME_RUN_DIR", "XDG_RUNTIME_DIR", "TMPDIR"):
        base = os.environ.get(name)
        if base and os.access(base, os.W_OK):
            return base
    return "/tmp"


def _lock(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd
