"""A replica's decode worker whose engine is vLLM: hand-offs in, tokens out, as the native one.

It speaks the protocol of `runtime/worker.py`, and makes text, stop strings and the end of an answer
as all workers do (`runtime/engine/sequence.py`). A hand-off's KV is copied out of the arena by the
KV connector; what is not there any more vLLM computes from the token ids. What only vLLM can serve
comes as a `job`, before its prefill.

An engine takes ten seconds and more to start, beside workers that answer meanwhile. So it is
started by a thread of a low priority, which is a thread's own matter on Linux, and goes on in one
that has the priority of all others.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from dataclasses import replace
from typing import Any, NoReturn, cast

from coldframe.loader.cgroup import memory_available
from coldframe.loader.errors import ColdframeError, MemoryServiceGone, ReplicaError, RequestError
from coldframe.loader.process import collect_garbage, die_with_parent
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.cores import CORES, keep_to
from coldframe.runtime.device_choice import CPU
from coldframe.runtime.handoff import Handoff, Job
from coldframe.runtime.integrations.vllm.environment import SAMPLER_ENVIRONMENT
from coldframe.runtime.prefix import kv_format
from coldframe.runtime.vllm_spec import BLOCK_TOKENS, longest_in
from coldframe.runtime.worker import Worker
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import become, confine

__all__ = ["VllmWorker", "main"]

_NICE = 5
"""Of the thread that starts the engine: it gets a third of what those get who answer."""
_OOM_SCORE = 500
"""Of -1000 to 1000, in thousandths of all memory: so much more than it has it seems to have."""
_MOST_KV = 4 << 30
"""For a model of whose KV nothing is known here, in bytes."""
_VLLM_DECIDES = -1
"""As the longest sequence: what the KV has room for, which vLLM alone knows of such a model."""


class VllmWorker(Worker):
    """The worker.

    Args:
        control: The socket to the front.
        recorder: Holds the spans of the start so far.
        user: Whom it becomes before it is up; None stays who it is.
    """

    def __init__(self, control: Channel, recorder: Recorder, user: Identity | None) -> None:
        self._init: dict[str, Any] = {}
        super().__init__(control, recorder, user=user)

    def _prepare(self, message: Message) -> None:
        self._init = message.body
        super()._prepare(message)

    # -- the start -------------------------------------------------------------------------------

    def boot(self, since_ns: int) -> None:
        """Brings the engine up; see `Worker.boot`."""
        outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def start() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            try:
                self._start(since_ns)
            except BaseException as error:  # noqa: BLE001 - raised by who waits for it
                outcome.put(error)
            else:
                outcome.put(None)

        threading.Thread(target=start, name="start", daemon=True).start()
        error = outcome.get()
        if error is not None:
            raise error
        if self.device != CPU:
            import torch

            torch.cuda.set_device(torch.device(self.device))  # a thread's own matter, too
        if self._user is not None:
            os.chdir("/")
            become(self._user)
            assert self._setup is not None
            die_with_parent(self._setup.parent)
        self.recorder.add("ready", now(), note=self._note)
        self.report_spans()
        self.control.send({"type": "up", "context": self.context})
        collect_garbage()

    def _start(self, since_ns: int) -> None:
        os.environ.update(SAMPLER_ENVIRONMENT)
        try:
            import torch
            import vllm
            from vllm import EngineArgs, LLMEngine  # noqa: F401 - it imports what is asked of it
        except ImportError as error:
            raise RequestError(
                "this Python has no vLLM that can be imported",
                where="--vllm-python",
                got=f"{sys.executable}: {error}",
                hint="Install vLLM there, or name another.",
            ) from error
        # Now: another user may not be let in where they are.
        import coldframe.runtime.answer
        import coldframe.runtime.engine.device_errors
        import coldframe.runtime.engine.sequence  # noqa: F401
        from coldframe.runtime.integrations.vllm.attached import provide
        from coldframe.runtime.integrations.vllm.engine import (
            Engine,
            engine_arguments,
            start_engine,
        )
        from coldframe.runtime.integrations.vllm.lean import look_at_model_here

        self.recorder.add("imports", since_ns)
        self.control.send({"type": "imported"})
        waited = now()
        self._prepared.wait()
        self.recorder.add("attach", waited, waits_for="weights")
        if self._failure is not None:
            raise self._failure
        assert self._setup is not None
        setup = self._setup
        self.client, self.spec, self.tokenizer = setup.client, setup.spec, setup.tokenizer
        self.plan, self.kv = setup.plan, setup.kv
        provide(self.client)
        self.report_spans()
        kv_bytes = self._kv_bytes()
        per_token = self.spec.kv_block_bytes(self.spec.dtype_bytes, 1)
        context = longest_in(self.spec, kv_bytes)
        if not self.spec.native:
            context = _VLLM_DECIDES
        elif context < 1:
            raise RequestError(
                "vLLM's KV holds not one block",
                where="--vllm-kv",
                expected=f"more than {2 * BLOCK_TOKENS * per_token:,} bytes",
                got=f"{kv_bytes:,}",
            )
        arguments = engine_arguments(
            self._init["model"],
            self.device,
            self.spec.dtype,
            context,
            kv_bytes,
            self._init["args"],
        )
        if self.spec.native:
            look_at_model_here(self._init["model"])
        engine = start_engine(arguments, self.device, self.recorder, takes_kv=self.spec.native)
        self.context = engine.model_config.max_model_len
        self.engine = Engine(engine)
        self._sharing = self.engine.sharing()
        self._note = f"vLLM {vllm.__version__}, {kv_bytes / 1e6:.0f} MB of KV; {self._sharing}"
        # What is done between steps, of which vLLM knows nothing.
        self.model = cast(Any, _Resting(torch.device(self.device)))

    def _kv_bytes(self) -> int:
        """Memory for vLLM's own KV: as much as the replica's has, where nobody says otherwise."""
        wanted: int | None = self._init["kv_bytes"]
        if wanted is not None:
            return wanted
        if not self.spec.native:
            if self.device != CPU:
                raise RequestError(
                    "vLLM is to be told how much KV it may have for this model",
                    where="--vllm-kv",
                    hint="Give it a size, as --vllm-kv 8GiB.",
                )
            return min(_MOST_KV, memory_available() // 4)
        if self.device == CPU:
            # It is taken as it is touched, but vLLM takes none that is not there now.
            return min(self.kv.nbytes, memory_available() // 4)
        return self.kv.nbytes

    # -- requests --------------------------------------------------------------------------------

    def serve(self) -> None:
        """Serves until the front is gone.

        Raises:
            ColdframeError: The memory service is gone.
        """
        from coldframe.runtime.integrations.vllm.requests import Requests

        requests = Requests(self, self.engine, self.context)
        while True:
            self.beat()
            idle = not self.engine.busy
            # Weights that have left for others come back stage by stage.
            complete = self.client.complete
            for message in self.messages(block=idle or not complete):
                match message.kind:
                    case "handoff":
                        handoff = Handoff.from_wire(message.body["handoff"])
                        requests.take(handoff.job, handoff)
                    case "job":
                        requests.take(Job.from_wire(message.body["job"]))
                    case "cancel":
                        requests.cancel(message.body["request"])
            if not self.engine.busy:
                self.let_go()
            elif complete:
                requests.step()
            else:
                self.client.check_stalled()

    def let_go(self) -> bool:
        """As `Worker.let_go`. What vLLM has copied does not leave; that is said in the timeline."""
        lets_go = super().let_go()
        if lets_go:
            note = f"{self._sharing}; KV of vLLM's own stays"
            self.recorder.add("vllm_lets_go", now(), note=note)
            self.report_spans()
        return lets_go

    def knows(self, handoff: Handoff) -> bool:
        """Whether a hand-off's KV is that of this model, as this worker would find it."""
        ours = (self.plan.fingerprint, kv_format(self.spec.dtype))
        return (handoff.fingerprint, handoff.kv_format) == ours

    def job_of(self, job: Job) -> Job:
        """A job with its prompt's ids, and with a number of tokens to generate.

        Raises:
            RequestError: It is none for this model, or too long.
        """
        from coldframe.runtime.prompts import bounded, token_ids

        ids = token_ids(self, job)
        # vLLM gives KV as it is filled, and its context is what its KV has room for.
        return replace(bounded(job, len(ids), self.context), prompt=None, prompt_ids=ids)


class _Resting:
    """What a worker that is to let go of a device asks of its model."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def settle(self) -> None:
        """Waits until all that was begun on the device is done."""
        if self.device.type != "cpu":
            import torch

            torch.cuda.synchronize(self.device)

    def rebind(self, _: Any) -> None:
        raise ReplicaError("weights that vLLM uses cannot be laid out anew")


def main(control_fd: int, spawned_ns: int, first_ns: int, user: str | None = None) -> NoReturn:
    """The process's entry; see `worker_process.main`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    recorder = Recorder("worker")
    recorder.add("interpreter", spawned_ns, first_ns)
    control = Channel.from_fd(control_fd)
    role = "vllm"
    try:
        _go_first()
        identity = None
        if user is not None:
            import json

            identity = Identity.from_wire(json.loads(user))
            confine(identity)
        keep_to(os.environ.get(CORES))
        worker = VllmWorker(control, recorder, identity)
        worker.boot(first_ns)
        worker.serve()
    except ColdframeError as error:
        if error.__cause__ is not None and not isinstance(error, MemoryServiceGone):
            traceback.print_exc()  # vLLM's own, which says where
        control.send({"type": "broken", "error": error.to_wire()})
    except Exception as error:  # noqa: BLE001 - the front must hear of whatever ends a worker
        traceback.print_exc()
        control.send({"type": "broken", "error": _typed(error, role).to_wire()})
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
