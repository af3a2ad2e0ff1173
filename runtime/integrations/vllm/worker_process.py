"""A vLLM worker's process, from its first line to its end; in between it is `worker`'s."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import NoReturn

from coldframe.loader.errors import ColdframeError, MemoryServiceGone, ReplicaError
from coldframe.loader.timeline import Recorder
from coldframe.loader.wire import Channel
from coldframe.runtime.integrations.vllm.worker import Frozen, VllmWorker
from coldframe.runtime.machine.cores import CORES, keep_to
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import confine

__all__ = ["main", "work"]

_OOM_SCORE = 500
"""Of -1000 to 1000, in thousandths of all memory: so much more than it has it seems to have."""


def main(control_fd: int, spawned_ns: int, first_ns: int, user: str | None = None) -> NoReturn:
    """The process's entry; see `worker.process.main`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    recorder = Recorder("worker")
    recorder.add("interpreter", spawned_ns, first_ns)
    control = Channel.from_fd(control_fd)
    identity = None
    try:
        if user is not None:
            identity = Identity.from_wire(json.loads(user))
            confine(identity)
    except ColdframeError as error:
        control.send({"type": "broken", "error": error.to_wire()})
        os._exit(1)
    work(control, recorder, first_ns, user=identity)


def work(
    control: Channel,
    recorder: Recorder,
    since_ns: int,
    *,
    user: Identity | None = None,
    frozen: Frozen | None = None,
) -> NoReturn:
    """A worker's whole life; it ends the process. See `worker.process.work`."""
    try:
        _go_first()
        keep_to(os.environ.get(CORES))
        worker = VllmWorker(control, recorder, user, frozen)
        worker.boot(since_ns)
        worker.serve()
    except ColdframeError as error:
        if error.__cause__ is not None and not isinstance(error, MemoryServiceGone):
            traceback.print_exc()  # vLLM's own, which says where
        control.send({"type": "broken", "error": error.to_wire()})
    except Exception as error:  # noqa: BLE001 - the front must hear of whatever ends a worker
        traceback.print_exc()
        control.send({"type": "broken", "error": _typed(error, "vllm").to_wire()})
    finally:
        # Not through the interpreter's end: vLLM's threads would keep it.
        os._exit(1)


def _go_first() -> None:
    """Where memory runs out the kernel ends this process, and not those who answer without it."""
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            if int(file.read()) < _OOM_SCORE:
                file.seek(0)
                file.write(str(_OOM_SCORE))
    except OSError as error:  # a container may have it read-only
        print(f"coldframe: the kernel was not told what to end first: {error}", file=sys.stderr)


def _typed(error: Exception, role: str) -> ColdframeError:
    """What ended a worker: its GPU, or else itself."""
    broke = ReplicaError("a worker broke", where=role, got=repr(error))
    if "coldframe.runtime.engine.device_errors" not in sys.modules:
        return broke
    from coldframe.runtime.engine.device_errors import as_device_error

    return as_device_error(error, role) or broke
