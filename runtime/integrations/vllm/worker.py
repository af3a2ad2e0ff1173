"""A replica's decode worker whose engine is vLLM: hand-offs in, tokens out, as the native one.

It speaks the protocol of `runtime/worker/worker.py`, and makes text, stop strings and the end of an
answer as all workers do (`runtime/engine/sequence.py`). A hand-off's KV is copied out of the arena
by the KV connector; what is not there any more vLLM computes from the token ids. What only vLLM can
serve comes as a `job`, before its prefill.

An engine takes ten seconds and more to start, beside workers that answer meanwhile. So it is
started by a thread of a low priority, which is a thread's own matter on Linux, and goes on in one
that has the priority of all others. A clone has its engine already (`frozen`), and only has to get
its weights. The process around all of it is `worker.process`'s.
"""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from typing import Any, cast

from coldframe.loader.errors import DeviceFull, ReplicaError, RequestError, SnapshotError
from coldframe.loader.process import collect_garbage, die_with_parent
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.integrations.vllm.environment import SAMPLER_ENVIRONMENT
from coldframe.runtime.integrations.vllm.plugin import LOAD_FORMAT
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.replica.vllm_memory import kv_that_fits
from coldframe.runtime.worker.handoff import Handoff, Job
from coldframe.runtime.worker.prefix import kv_format
from coldframe.runtime.worker.worker import Warm, Worker
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import become

__all__ = ["Frozen", "VllmWorker", "import_engine"]

_NICE = 5
"""Of the thread that starts the engine: it gets a third of what those get who answer."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a clone has from before it was frozen.

    Args:
        engine: vLLM's `LLMEngine`, without weights.
        warm: What it has for the rest of its work.
    """

    engine: Any
    warm: Warm


class VllmWorker(Worker):
    """The worker.

    Args:
        control: The socket to the front.
        recorder: Holds the spans of the start so far.
        user: Whom it becomes before it is up; None stays who it is. A clone has become it already.
        frozen: What a clone has; None for a worker that starts fresh.
    """

    def __init__(
        self,
        control: Channel,
        recorder: Recorder,
        user: Identity | None = None,
        frozen: Frozen | None = None,
    ) -> None:
        self._init: dict[str, Any] = {}
        self._frozen = frozen
        super().__init__(control, recorder, None if frozen is None else frozen.warm, user)

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
            # Not the run directory, where it is not let in.
            for name in ("TMPDIR", "VLLM_RPC_BASE_PATH"):
                os.environ.pop(name, None)
            tempfile.tempdir = None
            assert self._setup is not None
            die_with_parent(self._setup.parent)
        self.recorder.add("ready", now(), note=self._note)
        self.report_spans()
        self.control.send({"type": "up", "context": self.context})
        collect_garbage()

    def _start(self, since_ns: int) -> None:
        os.environ.update(SAMPLER_ENVIRONMENT)
        if self._frozen is None:
            import_engine()
            self.recorder.add("imports", since_ns)
        from coldframe.runtime.integrations.vllm.attached import provide
        from coldframe.runtime.integrations.vllm.engine import Engine

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
        engine = self._fresh() if self._frozen is None else self._filled(self._frozen.engine)
        self.context = engine.model_config.max_model_len
        self.engine = Engine(engine)
        self._sharing = self.engine.sharing()
        version, kv_bytes = _version(), _kv_bytes_of(engine)
        self._note = f"vLLM {version}, {kv_bytes / 1e6:.0f} MB of KV; {self._sharing}"
        # What is done between steps, of which vLLM knows nothing.
        import torch

        self.model = cast(Any, _Resting(torch.device(self.device)))

    def _fresh(self) -> Any:
        """An engine with its weights, as this start wants it."""
        from coldframe.runtime.integrations.vllm.engine import (
            engine_arguments,
            longest_sequence,
            start_engine,
        )
        from coldframe.runtime.integrations.vllm.lean import look_at_model_here

        model, kv_bytes = self._init["model"], self._kv_bytes()
        arguments = engine_arguments(
            *(model, self.device, self.spec.dtype),
            longest_sequence(self.spec, kv_bytes),
            kv_bytes,
            self._init["args"],
        )
        if self.spec.native:
            look_at_model_here(model)
        return start_engine(arguments, self.device, self.recorder, takes_kv=self.spec.native)

    def _filled(self, engine: Any) -> Any:
        """The engine that a clone came with, and its weights.

        Raises:
            SnapshotError: It needs more memory than there is.
        """
        from coldframe.runtime.integrations.vllm.connector import connectors
        from coldframe.runtime.integrations.vllm.frozen_memory import fill

        kv_bytes, most = _kv_bytes_of(engine), self.client.device.available() // 2
        if kv_bytes > most and self._init["kv_bytes"] is None:
            # It is taken as it is touched: it would be missed when many ask.
            raise SnapshotError(
                "the engine of this image has more KV than there is memory for",
                where="vLLM's KV",
                expected=f"at most {most:,} bytes, half of what is available",
                got=f"{kv_bytes:,}",
                hint="Make an image with less: coldframe snapshot create --vllm-kv SIZE.",
            )
        try:
            self._fit(kv_bytes, itself=0)
        except DeviceFull as error:
            raise SnapshotError(
                "the engine of this image needs more memory than there is",
                where="vLLM's KV",
                expected=error.expected,
                got=error.got,
                hint="Make an image with less: coldframe snapshot create --vllm-kv SIZE.",
            ) from error
        with self.recorder.span("vllm_weights"):
            fill(engine, LOAD_FORMAT, {"gated": False})
        for connector in connectors(engine):
            if connector is not None:
                connector.tally.recorder = self.recorder
        return engine

    def _kv_bytes(self) -> int:
        """Memory for vLLM's own KV: as much as the replica's has, where nobody says otherwise.

        Raises:
            RequestError: It has to be said how much that is.
            DeviceFull: There is not memory enough for the engine.
        """
        wanted: int | None = self._init["kv_bytes"]
        if wanted is None and not self.spec.native and self.device != CPU:
            raise RequestError(
                "vLLM is to be told how much KV it may have for this model",
                where="--vllm-kv",
                hint="Give it a size, as --vllm-kv 8GiB.",
            )
        return self._fit(wanted)

    def _fit(self, wanted: int | None, itself: int | None = None) -> int:
        """How much KV an engine can have; see `kv_that_fits`."""
        coming = (stage for stage in self.plan.stages if not self.client.is_ready(stage.index))
        return kv_that_fits(
            self.spec,
            self.plan.placements,
            self.device,
            wanted=wanted,
            itself=itself,
            native_kv=self.kv.nbytes,
            coming=sum(stage.nbytes for stage in coming),
            available=self.client.device.available(),
        )

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
            requests.admit()
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
        from coldframe.runtime.worker.prompts import bounded, token_ids

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


def import_engine() -> None:
    """Imports all that a worker needs, vLLM first.

    Raises:
        RequestError: There is none.
    """
    try:
        from vllm import EngineArgs, LLMEngine  # noqa: F401 - it imports what is asked of it
    except Exception as error:  # a broken install may raise anything
        raise RequestError(
            "this Python has no vLLM that can be imported",
            where="--vllm-python",
            got=f"{sys.executable}: {type(error).__name__}: {error}",
            hint="Install vLLM there, or name another.",
        ) from error
    # Now: another user may not be let in where they are.


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _kv_bytes_of(engine: Any) -> int:
    return int(engine.vllm_config.cache_config.kv_cache_memory_bytes)
