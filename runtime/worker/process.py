"""A worker's process, from its first line to its end; what it does in between is `worker`'s."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.runtime.machine.cores import CORES, keep_to
from coldframe.runtime.worker.worker import Warm, Worker
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import confine

__all__ = ["main", "work"]


def main(control_fd: int, spawned_ns: int, first_ns: int, user: str | None = None) -> None:
    """The process's entry.

    Args:
        control_fd: The inherited end of the front's socket pair.
        spawned_ns: When the front started this process (CLOCK_MONOTONIC).
        first_ns: When its first line of Python ran.
        user: Whom it is to become, as JSON; see `Worker`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    recorder = Recorder("worker")
    recorder.add("interpreter", spawned_ns, first_ns)
    control = Channel.from_fd(control_fd)
    identity = None
    if user is not None:
        try:
            identity = Identity.from_wire(json.loads(user))
            confine(identity)
        except ColdframeError as error:
            control.send({"type": "broken", "error": error.to_wire()})
            os._exit(1)
    work(control, recorder, None, first_ns, identity)


def work(
    control: Channel,
    recorder: Recorder,
    warm: Warm | None,
    since_ns: int,
    user: Identity | None = None,
) -> NoReturn:
    """A worker's whole life; it ends the process.

    Args:
        control: The socket to the front.
        recorder: Holds the spans of the start so far.
        warm: What a clone has; None for a worker that starts fresh.
        since_ns: See `Worker.boot`.
        user: See `Worker`.
    """
    try:
        keep_to(os.environ.get(CORES))
    except ColdframeError as error:
        control.send({"type": "broken", "error": error.to_wire()})
        os._exit(1)
    worker = Worker(control, recorder, warm, user)
    try:
        worker.boot(since_ns)
        _loop(worker.role)(worker)
    except ColdframeError as error:
        worker.report_spans()
        control.send({"type": "broken", "error": error.to_wire()})
    except Exception as error:  # noqa: BLE001 - the front must hear of whatever ends a worker
        traceback.print_exc()
        control.send({"type": "broken", "error": _typed(error, worker.role).to_wire()})
    finally:
        # Not through the interpreter's end: threads may be inside a kernel over mapped memory.
        os._exit(1)


def _typed(error: Exception, role: str) -> ColdframeError:
    """What ended a worker: its GPU, or else itself."""
    broke = ReplicaError("a worker broke", where=role, got=repr(error))
    if "torch" not in sys.modules:
        return broke
    try:
        from coldframe.runtime.engine.device_errors import as_device_error
    except (
        ImportError,
        OSError,
    ):  # this user may not be let in where it is; no GPU, or it were here
        return broke
    return as_device_error(error, role) or broke


def _loop(role: str) -> Callable[[Worker], None]:
    if role == "prefill":
        from coldframe.runtime.worker.prefill import run
    elif role == "decode":
        from coldframe.runtime.worker.decode import run
    else:
        raise ReplicaError("unknown role", expected="prefill or decode", got=role)
    return run
