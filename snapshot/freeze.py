"""The freeze point: where a warm worker waits to be dumped, and where its clones wake up.

CRIU dumps the process while it blocks in `wait`; each clone goes on behind it with the message
that its own front sends. The template tier forks in `wait` instead and has it return in the child.
What comes back tells a clone what this start is, and the hooks have run by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic_ns
from typing import Any

from coldframe.loader.errors import SnapshotError
from coldframe.loader.wire import Channel, Message
from coldframe.snapshot.hooks import Hooks
from coldframe.snapshot.quiesce import quiesce
from coldframe.snapshot.wake import Wake

__all__ = ["Wait", "freeze_point", "receive"]

Wait = Callable[[Channel], tuple[Channel, Message | None]]
"""Blocks until there is a start to serve: the control socket to go on with, and its message."""


def receive(control: Channel) -> tuple[Channel, Message | None]:
    """The plain way to wait: for a message on the control socket, without a deadline."""
    return control, control.recv()


def freeze_point(
    control: Channel,
    state: Mapping[str, Any],
    wait: Wait = receive,
    hooks: Hooks | None = None,
) -> tuple[Channel, Wake]:
    """Comes to rest, says so, and blocks until a clone of this process is to go on.

    Sends `frozen` with `state`. When the stream ends instead of waking anybody, the process ends.
    So does a clone whose message is not what it should be, or whose hooks fail: it is half this
    start's and half the creator's. It says `broken` to its own front, with the error.

    Args:
        control: The one socket that stays open.
        state: What whoever makes the image needs to know, as JSON values: `gpu`, where this has a
            context on one, and `own_bytes`, what it has of that for itself besides.
        wait: What blocks; a template forks in it.
        hooks: What to run after the restore; by default all that there are.

    Returns:
        In the clone: the control socket to go on with, and what this start is.

    Raises:
        SnapshotError: The process cannot be frozen; nothing was sent.
    """
    on_gpu = state.get("gpu") is not None
    hooks = Hooks.standard(on_gpu=on_gpu) if hooks is None else hooks
    quiesce(control.fileno(), on_gpu=on_gpu)
    control.send({"type": "frozen", **state})
    control, message = wait(control)
    first_ns = monotonic_ns()
    if message is None:
        # Not through the interpreter's end, which would undo what the creator has built.
        os._exit(0)
    try:
        wake = Wake.from_message(message, first_ns)
        return control, replace(wake, ran=hooks.run(wake))
    except SnapshotError as error:
        try:
            control.send({"type": "broken", "error": error.to_wire()})
        finally:
            os._exit(1)
