"""Forks of a process at its freeze point: who makes them, and who asks for them.

The process that is forked does nothing else. It has one thread, and holds nothing but its control
socket and a line for each clone that lives, so that a fork is as clean as an image. What there is
to decide about clones, another process decides, and asks for them over the control socket: `fork`,
with the clone's own control socket and its line. Over the line comes the clone's PID, and in the
end its exit code, each as one number. The end of the line is the end of the clone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import threading

from coldframe.loader.errors import PlatformError, SnapshotError
from coldframe.loader.process import die_with_parent
from coldframe.loader.wire import Channel, Message

__all__ = ["Fork", "Forker", "fork_on_demand"]

_NUMBER = struct.Struct("i")
_ANSWER_S = 10.0


def fork_on_demand(control: Channel) -> tuple[Channel, Message | None]:
    """What a template does at its freeze point (see `freeze.Wait`).

    Args:
        control: The socket over which forks are asked for, one at a time.

    Returns:
        In each clone: its own control socket and its first message. In the template, when nobody
        asks any more: no message. All clones have ended then.
    """
    family = _Family()
    while True:
        ready = _readable([control.fileno(), *family.descriptors])
        family.bury(ready)
        if control.fileno() not in ready:
            continue
        request = control.recv()
        if request is None:
            family.bury(family.descriptors)
            return control, None
        if family.fork(control, request):
            return control, control.recv()


class _Family:
    """The clones of this process that live."""

    def __init__(self) -> None:
        self._living: list[tuple[int, int, socket.socket]] = []
        """PID, pidfd and line of each."""

    @property
    def descriptors(self) -> set[int]:
        """Readable is one whose clone has ended, or is to end."""
        return {fd for _, pidfd, line in self._living for fd in (pidfd, line.fileno())}

    def fork(self, control: Channel, request: Message) -> bool:
        """Makes a clone. In it, and only there, the result is true.

        The clone's control socket takes the place of `control`, as it does when an image is
        restored: whoever has that channel already talks to the clone's own front.
        """
        control_fd, line_fd = request.fds
        line = socket.socket(fileno=line_fd)
        template = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(control_fd)
            _say(line, -(error.errno or 1))
            line.close()
            return False
        if pid:
            os.close(control_fd)
            self._living.append((pid, os.pidfd_open(pid), line))
            _say(line, pid)
            return False
        die_with_parent(template)
        os.setpgid(0, 0)  # as a fresh worker: what hits the template's group does not hit this
        # A copy of a line would keep it from ending.
        line.close()
        for _, pidfd, other in self._living:
            os.close(pidfd)
            other.close()
        os.dup2(control_fd, control.fileno(), inheritable=False)
        os.close(control_fd)
        return True

    def bury(self, ready: set[int]) -> None:
        """Ends the clones whose descriptors these are, and says how they ended."""
        for clone in list(self._living):
            pid, pidfd, line = clone
            if ready.isdisjoint((pidfd, line.fileno())):
                continue
            os.kill(pid, signal.SIGKILL)  # one that has ended is a zombie still, and unharmed
            _, status = os.waitpid(pid, 0)
            self._living.remove(clone)
            os.close(pidfd)
            _say(line, os.waitstatus_to_exitcode(status))
            line.close()


class Fork:
    """A clone as the process sees it that has asked for it (see `service.Clone`).

    Args:
        pid: Its process id.
        line: Its line.
    """

    channel = None

    def __init__(self, pid: int, line: socket.socket) -> None:
        self._pid = pid
        self._line = line
        self._status: int | None = None

    @property
    def pidfd(self) -> int:
        """Readable when it has ended."""
        return self._line.fileno()

    def inside(self) -> int:
        return self._pid

    def kill(self) -> int:
        """Ends it, where it has not ended: its exit code, or minus the signal that ended it."""
        if self._status is None:
            with contextlib.suppress(OSError):  # it has ended already
                self._line.shutdown(socket.SHUT_WR)
            status = _hear(self._line)
            # Where the template has died or hangs, nobody says: the kernel ends the clone with it.
            self._status = -signal.SIGKILL if status is None else status
            self._line.close()
        return self._status


class Forker:
    """Asks a template for forks; may be used from several threads.

    Args:
        control: The socket to it.
    """

    def __init__(self, control: Channel) -> None:
        self._control = control
        # One request at a time: a clone must not find the next one in what it has inherited.
        self._lock = threading.Lock()

    def fork(self, control_fd: int) -> Fork:
        """A new clone with that control socket, which stays the caller's to close.

        Raises:
            PlatformError: There is no room for another process.
            ReplicaError: The template is gone.
            SnapshotError: It does not answer, and is given up.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_ANSWER_S)
        try:
            with self._lock:
                try:
                    self._control.send({"type": "fork"}, [control_fd, theirs.fileno()])
                finally:
                    theirs.close()
                number = _hear(ours)
            if number is None:
                self._control.hang_up()
                raise SnapshotError("the template has not made a clone", got="no answer")
            if number < 0:
                raise PlatformError("the template cannot fork", got=os.strerror(-number))
        except BaseException:
            ours.close()
            raise
        return Fork(number, ours)


def _readable(fds: list[int]) -> set[int]:
    """Waits until some of these are. Made anew each time, as a clone would share an epoll."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll()}


def _say(line: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # who asked is gone
        line.send(_NUMBER.pack(number))


def _hear(line: socket.socket) -> int | None:
    """The next number; None where there comes none."""
    try:
        data = line.recv(_NUMBER.size)
    except OSError:
        return None
    return int(_NUMBER.unpack(data)[0]) if data else None
