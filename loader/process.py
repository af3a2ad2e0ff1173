"""Processes of a replica: started bare, tied to their parent's life, and their run directory."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import sys
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any

from coldframe.loader.errors import PlatformError

__all__ = [
    "Child",
    "collect_garbage",
    "die_with_parent",
    "make_run_dir",
    "remove_run_dir",
    "spawn_python",
    "speak_up",
    "sweep_run_dirs",
]

_PR_SET_PDEATHSIG = 1
_INHERITED_FD = 3
_VOICE_FD = 4
_PREFIX = "coldframe-"
_MOST_PATH_BYTES = 107 - len("/memory.sock")  # what the kernel takes for a socket
_MOST_PID_BYTES = len("4194304")
_RANDOM_BYTES = 4
_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Child:
    """A child process of ours.

    Args:
        pid: Its process id.
        spawned_ns: When it was started, CLOCK_MONOTONIC.
        leads: Whether its process group is to end with it: whatever it has started itself.
    """

    def __init__(self, pid: int, spawned_ns: int, *, leads: bool = False) -> None:
        self.pid = pid
        self.spawned_ns = spawned_ns
        self._leads = leads
        self._status: int | None = None

    def wait(self) -> int:
        """Waits for its end: the exit code, or minus the signal that ended it."""
        if self._status is None:
            self._end_group(os.WEXITED)
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def poll(self) -> int | None:
        """The exit code where it has ended, else None."""
        if self._status is None and self._end_group(os.WEXITED | os.WNOHANG):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def kill(self) -> int:
        """Ends it at once and reaps it: the exit code, as `wait`."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def _end_group(self, options: int) -> bool:
        """Ends what a leader that is dead has left behind; False where it lives.

        Before it is reaped: until then the group's number is nobody else's.
        """
        if self._leads:
            if os.waitid(os.P_PID, self.pid, options | os.WNOWAIT) is None:
                return False
            # All of it may be another user's by now, or gone.
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return True


def spawn_python(
    code: str,
    args: Sequence[str],
    fd: int,
    env: dict[str, str],
    *,
    site_packages: bool = True,
    session: bool = False,
    executable: str | None = None,
    leads: bool = False,
    words: int | None = None,
) -> Child:
    """Starts an interpreter on a line of code, with one inherited descriptor (number 3).

    Standard input is /dev/null, so that nothing steals the terminal's; standard output goes to
    standard error, so that an answer on it stays whole. The child is in a process group of its
    own: a Ctrl-C on the terminal reaches the parent alone.

    Args:
        code: Run with `first_ns` (its first instant) and `sys` at hand; it may not block on fd 0.
        args: `sys.argv[1:]` of the child.
        fd: What it inherits.
        env: Its environment.
        site_packages: Whether it can import installed packages. One that needs none starts in
            half the time without them.
        session: Whether it leads a session of its own instead of a process group alone.
        executable: Which interpreter; by default this one.
        leads: Whether all processes of its group end with it; not for a session.
        words: A file for what it says before it calls `speak_up`, which gives it its standard
            error; by default it has that from the start.

    Raises:
        PlatformError: It cannot be started.
    """
    executable = executable or sys.executable
    # What is imported stays, so the collector would only walk it again and again; a process
    # switches it on when it is up (`collect_garbage`).
    prologue = "import time; first_ns = time.monotonic_ns(); import gc, sys; gc.disable(); "
    # -P: a module in the working directory must not stand in for one of ours.
    argv = [executable, "-P"]
    if not site_packages:
        # Without the site module nothing knows where this package is installed, so say it.
        argv.append("-S")
        prologue += (
            "root = type(sys)('coldframe'); sys.modules['coldframe'] = root; "
            f"root.__path__ = [{_package_root()!r}]; "
            # For `packages.add_site_packages`, which need not go looking then.
            f"sys.coldframe_packages = {[path for path in sys.path if path]!r}; "
        )
    argv += ["-c", prologue + code, *args]
    # Out of the way of 0, 1 and 2, which a parent may have had closed, and of 3: dup2 onto
    # itself would leave the close-on-exec flag set.
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    ours = [moved]
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
    if words is not None:
        ours.append(fcntl.fcntl(words, fcntl.F_DUPFD_CLOEXEC, 10))
        actions += [(os.POSIX_SPAWN_DUP2, 2, _VOICE_FD), (os.POSIX_SPAWN_DUP2, ours[-1], 2)]
    actions += [
        (os.POSIX_SPAWN_DUP2, 2, 1),
        (os.POSIX_SPAWN_DUP2, moved, _INHERITED_FD),
    ]
    spawned = monotonic_ns()
    try:
        if session:
            pid = os.posix_spawn(executable, argv, env, file_actions=actions, setsid=True)
        else:
            pid = os.posix_spawn(executable, argv, env, file_actions=actions, setpgroup=0)
    except OSError as error:
        raise PlatformError(
            "cannot start a process", where=executable, got=error.strerror
        ) from error
    finally:
        for number in ours:
            os.close(number)
    return Child(pid, spawned, leads=leads)


def speak_up() -> None:
    """Gives this process its standard error, where it was started with a file in its place."""
    sys.stderr.flush()
    os.dup2(_VOICE_FD, 2)
    os.dup2(2, 1)
    os.close(_VOICE_FD)


def collect_garbage() -> None:
    """Switches the collector on, for what comes from now on; what is there is there to stay."""
    gc.freeze()
    gc.enable()


def _package_root() -> str:
    """The folder that holds `loader/` and its neighbours, in a checkout and once installed."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent ends.

    What the kernel watches is the parent's thread that started this process, so start workers
    from a thread that lives as long as they shall.

    Args:
        parent: The process that must be alive for this one to go on.
    """
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the call.
    if os.getppid() != parent:
        os._exit(1)


def make_run_dir(parent: str | None = None) -> tuple[str, int]:
    """A private directory for one replica's sockets.

    Args:
        parent: Where; by default COLDFRAME_RUN_DIR, else the first of XDG_RUNTIME_DIR, TMPDIR and
            /tmp that can be written to and is short enough.

    Returns:
        Its path and a descriptor whose lock says that it is in use (see `sweep_run_dirs`).

    Raises:
        PlatformError: It cannot be made.
    """
    base = parent or _run_base()
    while True:
        random = os.urandom(_RANDOM_BYTES).hex()
        path = os.path.join(base, f"{_PREFIX}{os.getuid()}-{os.getpid()}-{random}")
        if len(os.fsencode(path)) > _MOST_PATH_BYTES:
            raise PlatformError(
                "the run directory's path is too long for sockets in it",
                where=path,
                expected=f"at most {_MOST_PATH_BYTES} bytes",
                got=f"{len(os.fsencode(path))} bytes",
                hint="Set COLDFRAME_RUN_DIR to a directory with a shorter path.",
            )
        try:
            os.mkdir(path, 0o700)
        except OSError as error:
            raise PlatformError(
                "cannot make the run directory",
                where=path,
                got=error.strerror,
                hint="Set COLDFRAME_RUN_DIR to a directory that can be written to.",
            ) from error
        lock = _lock(path)
        if lock is not None:
            return path, lock


def remove_run_dir(path: str) -> None:
    import shutil  # only at the end: it is slow to import

    shutil.rmtree(path, ignore_errors=True)


def sweep_run_dirs(parent: str | None = None) -> list[str]:
    """Removes run directories of this user whose replicas are gone, all processes killed at once.

    Returns:
        What was removed.
    """
    base = parent or _run_base()
    removed = []
    for entry in os.scandir(base):
        if not entry.name.startswith(f"{_PREFIX}{os.getuid()}-"):
            continue
        try:
            fd = os.open(entry.path, _OPEN_DIR)
        except OSError:  # no directory, or somebody else swept it
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
    wanted = os.environ.get("COLDFRAME_RUN_DIR")
    if wanted:
        return wanted
    for name in ("XDG_RUNTIME_DIR", "TMPDIR"):
        base = os.environ.get(name)
        if base and _has_room(base) and os.access(base, os.W_OK):
            return base
    return "/tmp"


def _has_room(base: str) -> bool:
    """Whether sockets can be in a run directory there, whichever process makes it."""
    name = len(f"/{_PREFIX}{os.getuid()}--") + _MOST_PID_BYTES + 2 * _RANDOM_BYTES
    return len(os.fsencode(base)) + name <= _MOST_PATH_BYTES


def _lock(path: str) -> int | None:
    """The lock, or None where somebody swept the directory before we had it."""
    try:
        fd = os.open(path, _OPEN_DIR)
    except FileNotFoundError:
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)
    if os.path.exists(path):
        return fd
    os.close(fd)
    return None
