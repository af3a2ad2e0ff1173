"""One clone brought back from an image: CRIU called under a PID 1.

CRIU spends a third of its time before it looks at the image: its start, and what it asks the
kernel. So it may be started while the image is still being read. It opens the inventory first, and
that one is a FIFO: CRIU waits in it until the image is there, and whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable

from coldframe.loader.errors import PlatformError, ReplicaError, SnapshotError
from coldframe.loader.wire import Channel
from coldframe.snapshot.criu import Criu, last_error
from coldframe.snapshot.inherited import Inherited
from coldframe.snapshot.init import Init, start_init
from coldframe.snapshot.linux import detach_mounts, protect_proc
from coldframe.snapshot.manifest import Process

__all__ = ["begin", "go_on", "restore", "run"]

_INVENTORY = "inventory.img"
_WHAT = "CRIU cannot restore the image"


def restore(
    criu: Criu, process: Process, images: str, work: str, control_fd: int, *, user: bool
) -> Init:
    """Starts to bring back a clone; its `Init` tells how that goes.

    Args:
        criu: The program.
        process: What was frozen.
        images: Where its image is; other clones may be made from it at the same time.
        work: A directory for this clone alone.
        control_fd: What it gets as its control socket. It is the caller's to close.
        user: Whether this is in a user namespace.

    Raises:
        PlatformError: Namespaces are not allowed here.
    """
    init = begin(criu, process, images, os.listdir(images), work, control_fd, user=user)
    go_on(init)
    return init


def begin(
    criu: Criu,
    process: Process,
    images: str,
    names: Iterable[str],
    work: str,
    control_fd: int,
    *,
    user: bool,
) -> Init:
    """As `restore`, for an image that is still on its way: `go_on` says when it is there.

    Args:
        criu: The program.
        process: What was frozen.
        images: Where its image will be.
        names: Its files.
        work: A directory for this clone alone.
        control_fd: What it gets as its control socket. It is the caller's to close.
        user: Whether this is in a user namespace.

    Raises:
        PlatformError: Namespaces are not allowed here, or there is no room in `work`.
    """
    links = os.path.join(work, "image")
    try:
        os.mkdir(links, 0o700)
        for name in names:
            if name != _INVENTORY:
                os.symlink(os.path.join(images, name), os.path.join(links, name))
        os.mkfifo(os.path.join(links, _INVENTORY), 0o600)
    except OSError as error:
        raise PlatformError(
            "no room for a clone's files", where=work, got=error.strerror
        ) from error
    command = [
        *criu.restore_command(links, work, process.control_inode, control_fd, user=user),
        "--leave-stopped",  # until `_confine` has done its part: its `wake` may be there already
    ]
    # Other clones will be made of what is in there, and it was hashed before this one ran.
    memory = os.path.dirname(images) if os.path.dirname(images) == os.path.dirname(work) else None

    def body(channel: Channel) -> int:
        os.set_inheritable(control_fd, True)
        pid = _start(command, _WHAT)
        # CRIU's log and the image must not stay open, nor this process's copy of the socket:
        # its end is how the other side knows that the clone has ended.
        os.close(control_fd)
        if channel.recv() is None:
            os._exit(1)
        _let_in(pid, os.path.join(images, _INVENTORY), os.path.join(links, _INVENTORY))
        _finish(pid, command, os.path.join(work, "restore.log"), _WHAT)
        _confine(memory, user=user)
        Inherited.here().give(process.pid)
        with contextlib.suppress(ProcessLookupError):  # it has been killed meanwhile
            os.kill(process.pid, signal.SIGCONT)
        return process.pid

    return start_init(body, [control_fd])


def go_on(init: Init) -> None:
    """Says that the image is there; where the clone has failed already, its `Init` tells that."""
    try:
        init.channel.send({"type": "image"})
    except ReplicaError:
        return


def run(command: list[str], log: str, what: str) -> None:
    """Runs CRIU to its end.

    Raises:
        SnapshotError: It failed; says what it said.
    """
    _finish(_start(command, what), command, log, what)


def _confine(memory: str | None, *, user: bool) -> None:
    """Takes from this mount namespace what CRIU needed and the clone must not have.

    Args:
        memory: Where the restorer keeps the image.
        user: Whether this is in a user namespace; its root has no rights over the machine's /proc.
    """
    if memory is not None and os.path.ismount(memory):
        detach_mounts(memory)
    try:
        protect_proc()
    except PlatformError:
        if not user:
            raise


def _let_in(pid: int, inventory: str, fifo: str) -> None:
    """Gives CRIU the inventory through the FIFO in which it waits, or will in a moment."""
    while True:
        try:
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError:  # nobody reads it yet
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return  # nor will
            time.sleep(0.0005)
    try:
        # Whoever opens it once more finds the file itself.
        os.symlink(inventory, f"{fifo}.link")
        os.rename(f"{fifo}.link", fifo)
        with open(inventory, "rb") as file:
            os.write(fd, file.read())
    finally:
        os.close(fd)


def _start(command: list[str], what: str) -> int:
    null = os.open(os.devnull, os.O_RDWR)
    actions = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
    try:
        return os.posix_spawn(
            command[0], command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, file_actions=actions
        )
    except OSError as error:
        raise SnapshotError(what, where=command[0], got=error.strerror) from error
    finally:
        os.close(null)


def _finish(pid: int, command: list[str], log: str, what: str) -> None:
    # Nobody else: the clone may have ended already, and how is PID 1's to tell.
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        try:
            with open(log, errors="replace") as file:
                said = last_error(file.read())
        except OSError:
            said = "it left no log"
        ending = f"exit status {code}" if code > 0 else f"signal {-code}"
        raise SnapshotError(what, where=command[0], got=f"{ending}: {said}")
