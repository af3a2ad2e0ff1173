"""PID 1 of a clone: starts what runs in namespaces of its own, and stands in for it outside.

A process comes back from an image with the PID that it was frozen with, so each clone has a PID
namespace to itself, and this small process is the first in it. It passes signals on to the clone,
reaps what the clone leaves behind, and ends as the clone ends; when it is killed, or when whoever
started it is gone, the kernel ends the whole namespace.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Collection
from typing import NoReturn

from coldframe.loader.errors import ColdframeError, PlatformError, SnapshotError
from coldframe.loader.wire import Channel
from coldframe.snapshot.linux import (
    NEW_MOUNTS,
    NEW_PIDS,
    adopting_orphans,
    die_with_parent,
    make_mounts_private,
    mount_proc,
    unshare,
)

__all__ = ["Init", "exit_code", "start_init"]

_PASSED_ON = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
_SIGNALLED = 128
_ENDING_S = 1.0
# Of /proc/PID/stat (linux/sched.h): it exits, and a signal has ended it.
_PF_EXITING, _PF_SIGNALED = 0x4, 0x400


class Init:
    """A PID 1 as its parent sees it.

    Args:
        pid: Its process id here.
        channel: What it says: `started`, or `failed` and why; then it ends.
    """

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid = pid
        self.channel = channel
        self.pidfd = os.pidfd_open(pid)
        self._status: int | None = None
        self._stands_for: int | None = None

    def inside(self) -> int | None:
        """The process that it stands in for, as its number is here."""
        found = self._first_child()
        self._stands_for = self._stands_for or found
        return found

    def reap(self) -> int:
        """Waits for its end: the clone's exit code, or minus the signal that ended it."""
        if self._status is None:
            _, status = os.waitpid(self.pid, 0)
            self._status = os.waitstatus_to_exitcode(status)
            os.close(self.pidfd)
            self.channel.close()
        code = self._status
        return _SIGNALLED - code if _SIGNALLED < code < _SIGNALLED + signal.NSIG else code

    def kill(self) -> int:
        """Ends it and all in its namespace, where it has not ended: as `reap`.

        Where the clone is about to end by itself, how it ends is what counts: whoever saw its
        sockets close may ask for this before its PID 1 has been told.
        """
        if self._status is None:  # where it has, it is a zombie still, which a signal does not hurt
            if self._is_ending():
                poll = select.poll()
                poll.register(self.pidfd, select.POLLIN)
                poll.poll(_ENDING_S * 1000)
            os.kill(self.pid, signal.SIGKILL)
        return self.reap()

    def _first_child(self) -> int | None:
        try:
            with open(f"/proc/{self.pid}/task/{self.pid}/children") as file:
                children = file.read().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def _is_ending(self) -> bool:
        """Whether what it stands for is on its way out, or gone already."""
        first = self._first_child()
        if self._stands_for is not None and first != self._stands_for:
            return True
        if first is None:  # it has started nothing yet
            return False
        try:
            with open(f"/proc/{first}/stat") as file:
                # The name, in parentheses, may hold anything.
                flags = int(file.read().rpartition(")")[2].split()[6])
        except OSError:
            return True
        return bool(flags & (_PF_EXITING | _PF_SIGNALED))


def start_init(body: Callable[[Channel], int], keep: Collection[int] = ()) -> Init:
    """Forks a PID 1 in a new PID namespace, with mounts of its own and a /proc that shows it.

    Args:
        body: Run in it, with the channel to the parent. Starts what it is to stand in for and
            returns its PID; raises ColdframeError where that fails.
        keep: Descriptors that it needs; all others are closed.

    Raises:
        PlatformError: Namespaces are not allowed here.
    """
    ours, theirs = Channel.pair()
    try:
        pid = _fork_init(body, ours, theirs, keep)
        ours.send({"type": "go"})
        return Init(pid, ours)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


def _fork_init(
    body: Callable[[Channel], int], ours: Channel, theirs: Channel, keep: Collection[int]
) -> int:
    """Forks it, and waits until it is a child of this process: its PID.

    Who has asked for a PID namespace for its children cannot go back where it was without
    privileges over the namespace that it came from, so a process in between asks, and ends.
    """
    with adopting_orphans():
        between = os.fork()
        if between == 0:
            try:
                ours.close()
                _fork_in_namespace(body, theirs, keep)
            finally:
                os._exit(1)
        _, status = os.waitpid(between, 0)
    if status != 0:
        raise PlatformError("cannot start a process", got=f"wait status {status} of its parent")
    message = ours.recv()
    assert message is not None  # `theirs` is open here
    if message.kind == "failed":
        raise ColdframeError.from_wire(message.body["error"])
    return int(message.body["pid"])


def _fork_in_namespace(
    body: Callable[[Channel], int], channel: Channel, keep: Collection[int]
) -> NoReturn:
    try:
        unshare(NEW_PIDS)
    except PlatformError as error:
        channel.send({"type": "failed", "error": error.to_wire()})
        os._exit(0)
    pid = os.fork()
    if pid == 0:
        _run(body, channel, keep)
    channel.send({"type": "born", "pid": pid})
    os._exit(0)


def exit_code(status: int) -> int:
    """What a PID 1 ends with for a wait status: it cannot end by a signal as others do."""
    code = os.waitstatus_to_exitcode(status)
    return _SIGNALLED - code if code < 0 else code


def _run(body: Callable[[Channel], int], channel: Channel, keep: Collection[int]) -> NoReturn:
    _close_all_but({*keep, 0, 1, 2, channel.fileno()})
    # Only now is it the child of whom it shall die with, who may have died before that call.
    if channel.recv() is None:
        os._exit(1)
    die_with_parent()
    poll = select.poll()
    poll.register(channel.fileno(), 0)
    if poll.poll(0):
        os._exit(1)
    os.setsid()
    # What its own parent made of signals is not this process's.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, *_PASSED_ON):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    try:
        unshare(NEW_MOUNTS)
        make_mounts_private()
        mount_proc()
        pid = body(channel)
    except ColdframeError as error:
        channel.send({"type": "failed", "error": error.to_wire()})
        os._exit(1)
    except BaseException as error:  # noqa: BLE001 - the parent must hear of whatever went wrong
        wrapped = SnapshotError(
            "a process in namespaces of its own could not be started", got=repr(error)
        )
        channel.send({"type": "failed", "error": wrapped.to_wire()})
        os._exit(1)
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: _signal(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    channel.send({"type": "started"})
    while True:
        try:
            ended, status = os.waitpid(-1, 0)
        except ChildProcessError:  # whatever `body` has started, it is not there
            os._exit(1)
        if ended == pid:
            os._exit(exit_code(status))


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has just ended, which the wait will tell
        return


def _close_all_but(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:  # the one of the listing itself
                continue
