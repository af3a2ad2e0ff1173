"""One worker written to files: started, warm, and CRIU called beside it under a PID 1.

Its counterpart is `restoring`. A worker on a GPU has its context checkpointed when it is warm, by
whoever can: then nothing of the driver's is left in it but memory, threads and pipes, which CRIU
can write.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from coldframe.loader.errors import ColdframeError, ReplicaError, SnapshotError
from coldframe.loader.process import spawn_python
from coldframe.loader.wire import Channel
from coldframe.snapshot.criu import Criu
from coldframe.snapshot.init import Init, start_init
from coldframe.snapshot.left_open import check_nothing_left_open
from coldframe.snapshot.libraries import mapped_files
from coldframe.snapshot.linux import set_last_pid
from coldframe.snapshot.restoring import run

__all__ = ["WARM_S", "Checkpoint", "freeze"]

_FIRST_PID = 1000
WARM_S = 120.0
"""How long a worker may take to be warm, in seconds."""

Checkpoint = Callable[[int, int], dict[str, Any]]
"""Has the driver write a process's context to that process's memory, and says what came of it:
`bytes` that it takes of the GPU, and `uuids`, what each GPU is called by its UUID. Called with the
process and what that says it has of the GPU for itself, in bytes."""


def freeze(
    criu: Criu,
    code: str,
    order: dict[str, Any],
    environment: dict[str, str],
    images: str,
    *,
    user: bool,
    warm_s: float = WARM_S,
    fds: Sequence[int] = (),
    checkpoint: Checkpoint | None = None,
) -> dict[str, Any]:
    """Starts a worker, waits until it is warm, and writes it to files.

    Args:
        criu: The program.
        code: The line of Python that the worker runs; its control socket is descriptor 3.
        order: The message that it gets.
        environment: All that it sees of this process's.
        images: An empty directory.
        user: Whether this is in a user namespace.
        warm_s: How long the worker may take to be warm, in seconds.
        fds: Descriptors that go beside the message; they stay the caller's.
        checkpoint: Has the context of a worker on a GPU written to its memory.

    Returns:
        What the worker said at its freeze point, and `pid`, `control_inode` and `libraries` of it;
        where it is on a GPU, what `checkpoint` gave, as `checkpointed`.

    Raises:
        SnapshotError: The worker could not be warmed, has files of the GPU's left, or CRIU could
            not write it.
        ColdframeError: Its context could not be checkpointed.
    """

    def body(channel: Channel) -> NoReturn:
        _freeze_here(criu, code, order, environment, images, channel, user, warm_s, fds)

    init = start_init(body, fds)
    said: dict[str, Any] | None = None
    checkpointed: dict[str, Any] = {}
    try:
        while (message := init.channel.recv()) is not None:
            match message.kind:
                case "failed":
                    raise ColdframeError.from_wire(message.body["error"])
                case "warm":
                    checkpointed = {
                        "checkpointed": _checkpoint(init, checkpoint, message.body["own_bytes"])
                    }
                    init.channel.send({"type": "checkpointed"})
                case _:
                    said = message.body
    finally:
        init.kill()
    if said is None:
        raise SnapshotError("the worker could not be frozen", got="its process ended")
    return {**said, **checkpointed}


def _checkpoint(init: Init, checkpoint: Checkpoint | None, own_bytes: int) -> dict[str, Any]:
    pid = init.inside()
    if checkpoint is None or pid is None:
        raise SnapshotError("nobody can checkpoint the worker's context", got=f"process {pid}")
    checkpointed = checkpoint(pid, own_bytes)
    check_nothing_left_open(pid)
    return checkpointed


def _freeze_here(
    criu: Criu,
    code: str,
    order: dict[str, Any],
    environment: dict[str, str],
    images: str,
    channel: Channel,
    user: bool,
    warm_s: float,
    fds: Sequence[int],
) -> NoReturn:
    """As PID 1 of the namespace: the worker, and CRIU beside it. Does not come back."""
    ours, theirs = Channel.pair()
    inode = os.fstat(theirs.fileno()).st_ino
    # What this process keeps for later it must not hand down: the worker, and every clone of it,
    # would never hear of a signal.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    set_last_pid(_FIRST_PID - 1)
    child = spawn_python(code, [], theirs.fileno(), environment, session=True)
    theirs.close()
    with contextlib.suppress(ReplicaError):  # it has died already, as is found now
        ours.send(order, fds)
    for fd in fds:  # the end of the last one is how its other side knows that the worker is done
        os.close(fd)
    try:
        message = ours.recv(warm_s)
    except TimeoutError:
        raise SnapshotError(
            "the worker was not warm in time", expected=f"within {warm_s:g} s"
        ) from None
    if message is None:
        raise SnapshotError(
            "the worker died before it was warm",
            got=f"exit status {child.wait()}",
            hint="What it said is on standard error.",
        )
    if message.kind != "frozen":
        raise ColdframeError.from_wire(message.body["error"])
    libraries = mapped_files(child.pid)
    if message.body.get("gpu") is not None:
        channel.send({"type": "warm", "own_bytes": message.body.get("own_bytes", 0)})
        if channel.recv() is None:
            os._exit(1)
    command = criu.dump_command(child.pid, images, "dump.log", inode, user=user)
    run(command, os.path.join(images, "dump.log"), "CRIU cannot write the image")
    os.unlink(os.path.join(images, "dump.log"))
    state = {"pid": child.pid, "control_inode": inode, "libraries": libraries}
    channel.send({**message.body, **state})
    os._exit(0)
