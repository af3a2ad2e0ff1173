"""A worker that is to be frozen: warmed up without a role, weights or KV, then cloned.

It runs up to the freeze point once, when the image or the template is made. Each clone goes on
behind it, as the worker of one start: from there on it is a worker like any other.
"""

from __future__ import annotations

import os
import sys
from math import prod
from typing import Any, NoReturn

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE, Reservation, round_up
from coldframe.loader.checkpoints.header import DTYPE_BITS
from coldframe.loader.errors import ColdframeError, SnapshotError
from coldframe.loader.timeline import Recorder, clock_shift_ns
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.replica.sizing import ModelFacts, StoredTensor
from coldframe.runtime.worker.process import work
from coldframe.runtime.worker.worker import Warm
from coldframe.snapshot.freeze import Wait, freeze_point, receive
from coldframe.snapshot.privileges import narrow, shed
from coldframe.snapshot.wake import Wake

__all__ = [
    "FREEZE",
    "awake",
    "forget_standard_streams",
    "freeze_order",
    "main",
    "room",
    "weights_room",
]

FREEZE = "from coldframe.runtime.frozen.worker import main; main(3)"
"""The line of Python that such a worker runs."""
_ROOM = 1 << 30


def freeze_order(
    model: ModelFacts,
    weights_bytes: int,
    kv_bytes: int,
    threads: int,
    device: str = "cpu",
    *,
    graphs: bool = False,
    code: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The message that says what to warm up for.

    On a GPU a connection to the memory service that has the model there goes beside it.

    Args:
        model: The model, whose small files are in a directory.
        weights_bytes: Of the weights' arena, to be reserved.
        kv_bytes: Of the KV's.
        threads: To warm up with.
        device: To compute on.
        graphs: Whether to capture decode steps, where the device can.
        code: Of its decode steps (see `Compiling.order`); None for none.
    """
    stored = [[name, t.dtype, list(t.shape)] for name, t in model.tensors.items()]
    return {
        "type": "freeze",
        "directory": model.directory,
        "tensors": stored,
        "arenas": [weights_bytes, kv_bytes],
        "threads": threads,
        "device": device,
        "graphs": graphs,
        "code": code or {"folder": None, "why": "not asked for"},
    }


def weights_room(model: ModelFacts) -> int:
    """Addresses to keep free for a model's weights, in bytes: a layout may take more than they do.

    Counted from its tensors, since an image may be made before their plan is known.
    """
    bits = sum(DTYPE_BITS[t.dtype] * prod(t.shape) for t in model.tensors.values())
    return room(bits // 8)


def room(nbytes: int) -> int:
    """Addresses to keep free for an arena of that size: more than it needs, they cost nothing."""
    return round_up(nbytes * 5 // 4, _ROOM) + _ROOM


def main(control_fd: int, wait: Wait = receive) -> None:
    """The process's entry.

    Args:
        control_fd: The inherited socket, to whoever freezes it.
        wait: What blocks at the freeze point; a template forks in it.
    """
    control = Channel.from_fd(control_fd)
    try:
        order = control.recv()
        if order is None:
            os._exit(0)
        on_gpu = order.body["device"] != "cpu"
        if on_gpu:
            narrow()  # the driver's threads start with what this one has
        warm = _warm(order)
        if not on_gpu:
            shed(parent=wait is not receive)
        os.chdir("/")  # which is there wherever a clone wakes up
        forget_standard_streams()
        state: dict[str, Any] = {"decode_steps": warm.decode_steps}
        if warm.gpu is not None:
            state |= {"gpu": warm.gpu.state(), "own_bytes": warm.gpu.own_bytes}
        control, wake = freeze_point(control, state, wait)
    except Exception as error:  # noqa: BLE001 - whoever waits must hear of whatever it was
        if not isinstance(error, ColdframeError):
            error = SnapshotError("a worker cannot be frozen or woken", got=repr(error))
        control.send({"type": "broken", "error": error.to_wire()})
        os._exit(1)
    _wake(control, wake, warm)


def _warm(message: Message) -> Warm:
    """All that a worker does before it knows its role."""
    order = message.body
    from coldframe.runtime.worker.lean_torch import import_torch

    import_torch()
    import torch

    # What a role imports, imported now.
    import coldframe.runtime.worker.decode
    import coldframe.runtime.worker.prefill  # noqa: F401
    from coldframe.runtime.compiled.warmup import ready_code
    from coldframe.runtime.frozen.calibration import measure_apart
    from coldframe.runtime.worker.text import Tokenizer
    from coldframe.runtime.worker.warmup import warm_up

    directory, threads = order["directory"], order["threads"]
    tensors = {name: StoredTensor(dtype, shape) for name, dtype, shape in order["tensors"]}
    model = ModelFacts(directory, tensors)
    tokenizer = Tokenizer.load(directory)
    if torch.get_num_threads() != threads:
        # Not set here: torch.set_num_threads starts a pool that nothing can end again.
        raise SnapshotError(
            "torch does not use the threads that the environment asks for",
            expected=threads,
            got=torch.get_num_threads(),
        )
    weights, kv = order["arenas"]
    if order["device"] != "cpu":
        from coldframe.runtime.frozen.gpu import warm_on_gpu

        (memory_fd,) = message.fds
        memory = Channel.from_fd(memory_fd)
        return warm_on_gpu(
            *(memory, model.spec, tokenizer, order["device"], weights, kv), graphs=order["graphs"]
        )
    saturation = measure_apart(model.spec)  # before there are threads that a fork would lack
    warm_up(model.spec, tokenizer)
    code, decode_steps = ready_code(model.spec, order["code"])
    # Nothing else gets to lie there, now or in any clone.
    reserved = (
        Reservation(weights, WEIGHTS_BASE, exact=True),
        Reservation(kv, KV_BASE, exact=True),
    )
    return Warm(tokenizer, reserved, saturation, code=code, decode_steps=decode_steps)


def _wake(control: Channel, wake: Wake, warm: Warm) -> NoReturn:
    """The clone's own life."""
    recorder, since_ns = awake(wake)
    work(control, recorder, warm, since_ns)


def awake(wake: Wake) -> tuple[Recorder, int]:
    """A recorder with the spans of a clone's start so far, and when the last of them ended."""
    recorder = Recorder(wake.name)
    recorder.add("snapshot_restore", wake.started_ns + clock_shift_ns(), wake.first_ns)
    last = wake.ran[-1].end_ns
    slowest = max(wake.ran, key=lambda ran: ran.end_ns - ran.start_ns)
    recorder.add("hooks", wake.first_ns, last, note=f"longest: {slowest.name}")
    return recorder, last


def forget_standard_streams() -> None:
    """Lets go of whatever the creator's terminal or log is."""
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
