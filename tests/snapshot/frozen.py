"""A real process at the freeze point, and clones of it that do what a test tells them.

The clones are forks, made where CRIU would make its own. In `namespaces` each is process 1 of a PID
namespace of its own, as the frozen process was: like clones of an image they cannot tell by the
process id that they are copies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coldframe.loader.errors import ColdframeError
from coldframe.loader.process import Child, spawn_python
from coldframe.loader.wire import Channel, Message
from coldframe.snapshot.freeze import freeze_point, receive
from coldframe.snapshot.hooks import Hooks
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.wake import Wake

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PATH": os.defpath,
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",  # numpy's starts its threads when it is imported
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    "CREATORS_OWN": "to be forgotten",
}
_CODE = (
    "sys.path.insert(0, sys.argv[1]); from tests.snapshot.frozen import main; main(*sys.argv[2:])"
)
_CLONE_NEWPID = 0x20000000


# -- in the process under test -------------------------------------------------------------------


def main(mode: str, prepare: str) -> None:
    """Prepares, freezes, and then does in each clone what its messages say."""
    os.closerange(4, 1 << 16)  # what the shell that runs the tests has left open
    if mode == "namespaces":
        _enter_pid_namespace()
    control = Channel.from_fd(3)
    scope: dict[str, Any] = {"control": control, "hooks": None, "state": {}}

    def fork_here(control: Channel) -> tuple[Channel, Message | None]:
        while message := control.recv():
            if mode == "namespaces":
                _unshare_pid()
            if os.fork() == 0:
                control.close()
                own = Channel.from_fd(message.fds[0])
                return own, own.recv()
            os.close(message.fds[0])
            if mode == "namespaces":
                _return_to_pid_namespace()
        return control, None

    try:
        exec(prepare, scope)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in scope.get("streams", (0, 1, 2)):
            os.dup2(null, fd)
        os.close(null)
        wait = receive if mode == "plain" else fork_here
        hooks: Hooks | None = scope["hooks"]
        control, wake = freeze_point(control, {"pid": os.getpid(), **scope["state"]}, wait, hooks)
        scope["wake"] = wake
        control.send({"type": "woken"})
        while (message := control.recv()) is not None:
            exec(message.body["first"], scope)
            control.send({"type": "value", "value": eval(message.body["value"], scope)})
    except ColdframeError as error:
        control.send({"type": "broken", "error": error.to_wire()})
    os._exit(0)


def _enter_pid_namespace() -> None:
    """Goes on as process 1 of a new namespace, and leaves a parent that waits for it."""
    _unshare_pid()
    child = os.fork()
    if child:
        os.close(3)
        os.waitpid(child, 0)
        os._exit(0)


def _unshare_pid() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def _return_to_pid_namespace() -> None:
    """The next fork is into this process's own again; else there is no unsharing a second time."""
    fd = os.open("/proc/self/ns/pid", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.setns(fd, _CLONE_NEWPID) != 0
    os.close(fd)
    if failed:
        raise OSError(ctypes.get_errno(), "setns")


# -- in the test ---------------------------------------------------------------------------------


class Clone:
    """A clone that has woken up."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def wake(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        threads: int = 1,
        identity: Identity | None = None,
        stderr: int | None = None,
    ) -> None:
        body = Wake.message("clone", environment or {}, threads, "/run", 1, identity)
        self.channel.send(body, [] if stderr is None else [stderr])
        assert said(self.channel).kind == "woken"

    def value(self, expression: str, first: str = "") -> Any:
        """What an expression is there, after some statements."""
        self.channel.send({"first": first, "value": expression})
        return said(self.channel).body["value"]


class Frozen:
    """A process at the freeze point."""

    def __init__(self, child: Child, channel: Channel) -> None:
        self.child, self.channel = child, channel
        self._clones: list[Channel] = []
        self.state = said(channel).body

    def clone(self) -> Clone:
        """A clone that waits for its `wake`."""
        ours, theirs = Channel.pair()
        self.channel.send({"type": "fork"}, [theirs.fileno()])
        theirs.close()
        self._clones.append(ours)
        return Clone(ours)

    def woken(self, environment: Mapping[str, str] | None = None, **given: Any) -> Clone:
        clone = self.clone()
        clone.wake(environment, **given)
        return clone

    def close(self) -> None:
        for channel in self._clones:
            channel.close()


def said(channel: Channel) -> Message:
    """The next message; an error in it is raised here."""
    message = channel.recv(timeout=60)
    assert message is not None, "it ended without a word"
    if message.kind == "broken":
        raise ColdframeError.from_wire(message.body["error"])
    return message


@contextlib.contextmanager
def frozen(
    prepare: str = "", mode: str = "plain", environment: Mapping[str, str] | None = None
) -> Iterator[Frozen]:
    """A process that has run `prepare` and is at its freeze point.

    Args:
        prepare: Statements.
        mode: `plain`, or `template` or `namespaces`, where it can be cloned.
        environment: Instead of the usual one.

    Raises:
        SnapshotError: What it said instead of freezing.
    """
    ours, theirs = Channel.pair()
    with contextlib.closing(theirs):
        env = dict(ENVIRONMENT if environment is None else environment)
        child = spawn_python(_CODE, [str(ROOT), mode, prepare], theirs.fileno(), env)
    try:
        process = Frozen(child, ours)
        with contextlib.closing(process):
            yield process
    finally:
        ours.close()
        # It ends with its socket, and in a namespace its clones with it.
        child.wait()
