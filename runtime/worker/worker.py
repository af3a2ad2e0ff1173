"""A worker: role-less until it is told, then prefill or decode.

What takes long is done at the same moment: the main thread imports torch, and has it start a GPU,
while a second one, which reads the control socket, maps the arenas and loads the tokenizer. What a
GPU needs to be warm is done while the weights come. The control socket is
the worker's one tie to the front: when it ends, the worker ends, whatever it is doing.

A worker that is to run as another user opens, maps and imports all that it will need as whoever
started it, and becomes that user just before it says that it is up. From there on it takes what it
needs from sockets alone.

Messages in:  `init` (with a connection to the memory service), then for a prefill worker `job`,
`ack`; for a decode worker `handoff`; for both `cancel`, `rest`.
Messages out: `imported`, `up`, `beat`, `tokens`, `handoff`, `ack`, `failed` (one request),
`broken` (the worker), `spans`, `rested`, of a prefill worker `saturation`, and of a decode worker
`graphs` and `trying` (see `DecodeSteps`).
"""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices import open_device
from coldframe.loader.devices.base import Mapping
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.memory_client.client import KvArena, MemoryClient
from coldframe.loader.process import collect_garbage, die_with_parent
from coldframe.loader.timeline import Recorder, clock_shift_ns, now
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker.decode_steps import DecodeSteps
from coldframe.runtime.worker.handoff import Handoff, Job
from coldframe.runtime.worker.kvpool import KvPool
from coldframe.runtime.worker.letting_go import LettingGo
from coldframe.runtime.worker.prefix import PrefixKeys, kv_format
from coldframe.runtime.worker.tensors import tensor_over, tensors_of, torch_dtypes
from coldframe.snapshot.identity import Identity
from coldframe.snapshot.privileges import become

if TYPE_CHECKING:
    import torch

    from coldframe.runtime.engine.compiled import Code
    from coldframe.runtime.engine.model import Model
    from coldframe.runtime.engine.saturation import Saturation
    from coldframe.runtime.engine.sequence import Sequence
    from coldframe.runtime.engine.spec import ModelSpec
    from coldframe.runtime.engine.varlen import Finding
    from coldframe.runtime.worker.handoff import Job
    from coldframe.runtime.worker.text import Tokenizer
    from coldframe.runtime.worker.warm_gpu import WarmGpu

__all__ = ["Warm", "Worker", "kv_format"]

BEAT_S = 5.0
"""How often a worker says that it is alive, in seconds."""


@dataclass(slots=True)
class _Setup:
    """What the second thread has prepared."""

    client: MemoryClient
    spec: ModelSpec
    tokenizer: Tokenizer
    plan: Plan
    kv: KvArena
    parent: int


@dataclass(frozen=True, slots=True)
class Warm:
    """What a clone has from before it was frozen.

    Args:
        tokenizer: The model's.
        reserved: The arenas' addresses, nothing mapped there.
        saturation: The smallest batch that saturates the device, where that was measured.
        gpu: What it has on a GPU.
        code: Its decode steps, compiled and loaded.
        decode_steps: How decode steps are computed, and why, for people.
    """

    tokenizer: Tokenizer
    reserved: tuple[Mapping, ...]
    saturation: Saturation | None = None
    gpu: WarmGpu | None = None
    code: Code | None = None
    decode_steps: str = "eager"


class Worker:
    """What both roles share: the sockets, the engine, the clock and the requests' text.

    Args:
        control: The socket to the front.
        recorder: Holds the spans of the start so far.
        warm: What a clone has; None for a worker that starts fresh.
        user: Whom it becomes before it is up; None stays who it is. A clone has become it already.
    """

    def __init__(
        self,
        control: Channel,
        recorder: Recorder,
        warm: Warm | None = None,
        user: Identity | None = None,
    ) -> None:
        self.control = control
        self.recorder = recorder
        self.inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        """Messages from the front; None says that the memory service has news."""
        self.role = ""
        self.device = ""
        self.overlap = True
        self.prefix_cache = True
        self.local_prefill = 0
        self._warm = warm
        self._user = user
        self._setup: _Setup | None = None
        self._shape: ModelSpec | None = None
        self.attention: Finding | None = None
        """What was found for attention on a GPU."""
        self._gpu = None if warm is None else warm.gpu
        self.steps = DecodeSteps(self, warm)
        self._failure: ColdframeError | None = None
        self._told = threading.Event()
        self._prepared = threading.Event()
        self._beaten = 0.0
        self._letting_go = LettingGo(self)
        threading.Thread(target=self._read, name="control", daemon=True).start()

    # -- the start -------------------------------------------------------------------------------

    def boot(self, since_ns: int) -> None:
        """Brings the engine up.

        Args:
            since_ns: When the process's first line of Python ran; for a clone, when it could go on.

        Raises:
            ColdframeError: It cannot come up.
        """
        from coldframe.runtime.worker.lean_torch import import_torch

        import_torch()

        # What either role imports, now: another user may not be let in where it is.
        import coldframe.runtime.engine.model
        import coldframe.runtime.worker.answer
        import coldframe.runtime.worker.decode
        import coldframe.runtime.worker.prefill  # noqa: F401

        if self._warm is None:
            self.recorder.add("imports", since_ns)
        self.control.send({"type": "imported"})
        waited = now()
        self._told.wait()
        if self._shape is not None and self._gpu is None:
            self._start_device(self._shape)
        self._prepared.wait()
        self.recorder.add("attach", waited, waits_for="weights")
        if self._failure is not None:
            raise self._failure
        assert self._setup is not None
        setup = self._setup
        started = now()
        self.client, self.spec, self.tokenizer = setup.client, setup.spec, setup.tokenizer
        self.plan, self.kv = setup.plan, setup.kv
        assert self.client.weights is not None
        self.spec.check(self.plan.placements)
        model = None
        if self._gpu is not None:
            self.attention = self._gpu.attention
            model = self.steps.take_model(self._gpu)
        self.model = model or self._make_model()
        self.recorder.add("kv_alloc", started, note="arenas as tensors")
        self.steps.look_up()
        if self._user is not None:
            os.chdir("/")  # another user may not be let in where this is, and need not be
            become(self._user)
            die_with_parent(setup.parent)  # forgotten with the change of user
        note = "but for the weights"
        if self.role == "prefill" and self.saturation is not None:
            note += f"; prefill in batches of {self.saturation.tokens} tokens"
        if self.steps.load_code():
            note += "; compiled decode step"
        self.recorder.add("ready", now(), note=note)
        self.report_spans()
        self.control.send({"type": "up"})
        self._warm_up()
        collect_garbage()

    def _make_model(self) -> Model:
        """The model over the arenas, where they are now."""
        from coldframe.runtime.engine.kv import KVCache
        from coldframe.runtime.engine.model import Model

        assert self.client.weights is not None
        reserved, dtype = self.kv.reservation, torch_dtypes()[self.spec.dtype]
        pages = tensor_over(reserved.address, self.kv.nbytes, reserved.dlpack_device)
        cache = KVCache(pages, self.spec, dtype, self.kv.blocks, BLOCK_TOKENS)
        model = Model(self.spec, tensors_of(self.plan, self.client.weights), cache)
        # That the tensors are not what the config says is rare.
        if self._shape is not None and self._shape.dtype != self.spec.dtype:
            self._find_attention(self.spec, cache.device)
        if self.attention is not None:
            model.varlen = self.attention.varlen
        return model

    def _start_device(self, shape: ModelSpec) -> None:
        """What a GPU is asked for without an arena: its context, and a kernel for attention.

        Args:
            shape: The model's, by its config.
        """
        import torch

        # When it is warmed up, and when it fails, there may be no way to import them.
        import coldframe.runtime.engine.device_errors
        import coldframe.runtime.worker.warmup
        from coldframe.runtime.engine import device

        where = torch.device("cpu")  # where the GPU is not one of torch's, its memory is the host's
        if torch.cuda.is_available():
            where = torch.device(self.device)
            with self.recorder.span("cuda_context"):
                device.start(where)
        self._find_attention(shape, where)
        if self.steps.may_replay:
            import coldframe.runtime.graphs.graphing  # noqa: F401 - for the same reason, and here alone

    def _find_attention(self, spec: ModelSpec, where: torch.device) -> None:
        from coldframe.runtime.engine import varlen

        with self.recorder.span("attention_trial"):
            dtype = torch_dtypes()[spec.dtype]
            self.attention = varlen.find(spec, dtype, where, block_tokens=BLOCK_TOKENS)

    def _warm_up(self) -> None:
        """First uses of a GPU, as far as there is time for them before the first weights to use.

        On a CPU there is nothing to do that a first step would not do as fast, and a clone's GPU
        has been used before. Where the weights are away, it is left to the first step after they
        have come back.
        """
        if self.attention is None or self._gpu is not None:
            return
        from coldframe.runtime.worker.warmup import ready_device

        assert self.client.weights is not None
        started = now()
        # The GPU is taken in turns. What decode warms up must not stand between the last weights
        # and the token that prefill draws then.
        needed = 0 if self.role == "prefill" else len(self.plan.stages) // 2
        if not self.client.away:
            tensors = tensors_of(self.plan, self.client.weights)
            ready_device(self.model, tensors, lambda: self.client.is_ready(needed))
        waits_for = f"stage_ready[{needed}]"
        self.recorder.add("warmup", started, note=str(self.attention), waits_for=waits_for)
        self.report_spans()

    def _read(self) -> None:
        """The second thread: prepares on `init`, then passes on what the front says."""
        try:
            self._follow_front()
        except Exception:  # noqa: BLE001 - a deaf worker would be waited for in vain
            traceback.print_exc()
        # The front is gone, or does not want this worker any more.
        os._exit(0)

    def _follow_front(self) -> None:
        while (message := self.control.recv()) is not None:
            if message.kind == "init":
                try:
                    self._prepare(message)
                except ColdframeError as error:
                    self._failure = error
                except BaseException as error:  # noqa: BLE001 - the main thread must hear of it
                    self._failure = ReplicaError("the worker cannot start", got=repr(error))
                self._told.set()
                self._prepared.set()
            else:
                self.inbox.put(message)

    def _prepare(self, message: Message) -> None:
        from coldframe.runtime.engine.foreign import read_spec
        from coldframe.runtime.worker.text import Tokenizer

        init, (memory_fd,) = message
        warm = self._warm
        if warm is None:  # a clone has another parent, and ends with that one
            die_with_parent(init["parent"])
        self.recorder.process = init["name"]
        self.recorder.offset_ns = init["clock_shift_ns"] - clock_shift_ns()
        self.role, self.device = init["role"], init["device"]
        self.overlap = init["overlap"]
        self.prefix_cache = init["prefix_cache"]
        self.local_prefill = init["local_prefill"]
        self.steps.told(init)
        if self.device != "cpu":
            self._shape = read_spec(init)
        self._told.set()
        client = MemoryClient(
            Channel.from_fd(memory_fd),
            init["name"],
            on_event=lambda: self.inbox.put(None),
            reserved=() if warm is None else warm.reserved,
            device=open_device(self.device) if self._gpu is None else self._gpu.device,
        )
        if warm is None:
            with self.recorder.span("tokenizer"):
                tokenizer = Tokenizer.load(init["model"])
        else:
            tokenizer = warm.tokenizer
        plan, _, kv = client.wait_arenas()
        spec = read_spec(init, plan.placements)
        self._setup = _Setup(client, spec, tokenizer, plan, kv, init["parent"])

    @property
    def saturation(self) -> Saturation | None:
        """What was measured before this was frozen, if it holds for what it computes with."""
        import torch

        found = None if self._warm is None or self.device != "cpu" else self._warm.saturation
        return found if found is not None and found.threads == torch.get_num_threads() else None

    # -- requests --------------------------------------------------------------------------------

    def kv_pool(self) -> KvPool:
        """The KV blocks, as this worker gets them."""
        keys = None
        if self.prefix_cache:
            layout = kv_format(self.spec.dtype)
            keys = PrefixKeys(self.plan.fingerprint, layout, BLOCK_TOKENS, self.spec.rope)
        return KvPool(
            self.client, self.kv.blocks, BLOCK_TOKENS, self.device, keys, self.model.settle
        )

    def sequence(self, job: Job, prompt_ids: tuple[int, ...]) -> Sequence:
        """A request, ready to compute."""
        from coldframe.runtime.engine.sequence import Sequence
        from coldframe.runtime.worker.answer import TextStream

        return Sequence(
            job.request,
            job.attempt,
            prompt_ids,
            job.generated_ids,
            job.params,
            TextStream(self.tokenizer, prompt_ids, job.params.stop),
            self.spec.eos_token_ids,
        )

    def give_on(self, sequence: Sequence) -> None:
        """Tells the front of a request that another worker is to go on with."""
        job = Job(
            sequence.request,
            sequence.attempt,
            sequence.params,
            prompt_ids=sequence.prompt_ids,
            generated_ids=tuple(sequence.generated_ids),
        )
        handoff = Handoff(
            job,
            self.plan.fingerprint,
            kv_format(self.spec.dtype),
            tuple(sequence.blocks),
            sequence.kv_tokens,
            self.device,
        )
        self.control.send({"type": "handoff", "handoff": handoff.to_wire()})

    def refuse(self, job: Job, error: ColdframeError) -> None:
        """Tells the front that one request has failed here."""
        self.control.send(
            {
                "type": "failed",
                "request": job.request,
                "attempt": job.attempt,
                "error": error.to_wire(),
            }
        )

    def messages(self, *, block: bool) -> Iterator[Message]:
        """What the front has said since, all of it.

        Args:
            block: Wait for something to happen first, at most a second.

        Raises:
            ColdframeError: The memory service has reported a failure, or is gone.
        """
        while True:
            try:
                message = self.inbox.get(block, 1.0 if block else None)
            except queue.Empty:
                return
            block = False
            if message is None:
                self.check_memory()
                self._follow_weights()
            elif message.kind == "rest":
                self._letting_go.asked(message.body["number"])
            else:
                yield message

    def _follow_weights(self) -> None:
        """Goes on with the weights where the memory service has put them, between two steps."""
        attached = self.client.take_attached()
        if attached is not None:
            self.recorder.add("attach", *attached, note="weights that are back")
        relaid = self.client.take_relaid()
        if relaid is not None:
            self.plan, weights = relaid
            self.model.rebind(tensors_of(self.plan, weights))
            self.client.let_go_of_old()

    def let_go(self) -> bool:
        """Lets go of the weights where the memory service wants that; while nothing is computed.

        Returns:
            Whether that was so. They come back stage by stage.
        """
        lets_go = self.client.is_to_let_go
        if lets_go:
            self.model.settle()
            self.client.let_go()
        self._letting_go.check()
        return lets_go

    def report_spans(self) -> None:
        spans = self.recorder.drain()
        if spans:
            self.control.send({"type": "spans", "spans": [span.to_wire() for span in spans]})

    def beat(self) -> None:
        """Tells the front that the main thread still goes round; to be called in its loop."""
        moment = time.monotonic()
        if moment - self._beaten > BEAT_S:
            self._beaten = moment
            self.control.send({"type": "beat"})

    def check_memory(self) -> None:
        """Raises what the memory service reported, also where all weights are in already."""
        if self.client.error is not None:
            raise self.client.error
