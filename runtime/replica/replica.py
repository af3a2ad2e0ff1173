"""A replica: its processes started all at once, watched, replaced when they die, and cleared away.

The memory services (`memories`) start first, since nothing beats the bytes; the workers
(`workforce`) import torch while the weights stream. Everything that follows is events: messages,
deaths, the clock.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from coldframe.loader.awake import AwakeClock
from coldframe.loader.errors import ColdframeError, ReplicaError, RequestError
from coldframe.loader.memory_service.board import BoardView
from coldframe.loader.process import sweep_run_dirs
from coldframe.loader.timeline import Recorder, Span, now
from coldframe.loader.transport.base import Ticket
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS, ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.answers import Listener
from coldframe.runtime.replica.bridge import Bridge
from coldframe.runtime.replica.contexts import Contexts
from coldframe.runtime.replica.device_faults import DeviceFaults
from coldframe.runtime.replica.gate import Gate
from coldframe.runtime.replica.kvwatch import KvWatch
from coldframe.runtime.replica.launch import Launch, WorkerProcess
from coldframe.runtime.replica.loads import blocks_of
from coldframe.runtime.replica.loop import Loop
from coldframe.runtime.replica.memories import Memories
from coldframe.runtime.replica.resting import RestingTogether
from coldframe.runtime.replica.router import Router
from coldframe.runtime.replica.sizing import ModelFacts, StoredTensor, facts_at_hand
from coldframe.runtime.replica.workforce import Workforce
from coldframe.runtime.transport.base import Given
from coldframe.runtime.worker.handoff import Handoff
from coldframe.runtime.worker.prefix import PrefixKeys, kv_format

__all__ = ["Replica"]

_SATURATION = ("tokens", "threads")


class Replica:
    """A model being served by processes of its own.

    Args:
        options: What it is to be.
        recorder: Gets the front's spans; `spans` has those of all processes.
        launch: Its processes, where they were started before this module was imported.
        loop: Whose it is to call, where others use it too; it stays open then.
        warn: Told where it does not go as it was asked for: on the CPU instead of a GPU.
        watch: Told which KV is there for requests to come.

    Use it as a context manager, or call `close`: it leaves nothing behind.

    Raises:
        ColdframeError: The model cannot be served. Nothing is left running then.
    """

    def __init__(
        self,
        options: ReplicaOptions,
        recorder: Recorder | None = None,
        launch: Launch | None = None,
        loop: Loop | None = None,
        warn: Callable[[str], None] = lambda _: None,
        watch: KvWatch | None = None,
    ) -> None:
        self.options = options
        self.recorder = recorder or Recorder("front")
        self.spans: list[Span] = []
        self.loop = loop or Loop()
        self._own_loop = loop is None
        self._error: ColdframeError | None = None
        self._next_tick = 0.0
        self._requests = 0
        self._given: set[str] = set()
        self._load_started_ns = None if options.hold_load else now()
        self._closed = False
        self._clock = AwakeClock()
        self._warn = warn
        self._watch = watch
        self.faults = DeviceFaults(warn)
        """What has befallen its device."""
        self._router = Router(self, self._clock)
        self._gate: Gate | None = None
        if options.snapshot.verify and options.snapshot.mode != "off":
            self._gate = Gate(self._submit_first, self._distrust)
        self._begin(launch)

    def _begin(self, launch: Launch | None) -> None:
        """Starts the processes, or takes over those that were started."""
        options = self.options
        self.facts: dict[str, Any] = {
            "device": ", ".join(options.devices),
            "device_why": options.device_why,
        }
        """What the memory service said of the load: `mode`, `why`, `verified`, `weights_bytes`.
        Beside it `device` and `device_why`, on a GPU `gpu` with its `name`, `total` and `free`
        bytes (of several the smallest), `snapshot`, with `engine` for a vLLM engine, and
        `prefill_batch`, once it is measured."""
        self._loaded_ns: int | None = None
        self._answered = False
        self._settled = False
        self.resigned = False
        """Whether it is at rest, or is to be as soon as it has nothing to do: nothing is started
        that is not needed for what is open."""
        self._model: ModelFacts | None = None
        self._launch = launch or Launch(self.options, self.recorder)
        self._memories = Memories(
            self._launch, self.loop, self._clock, self.facts, self, self._warn
        )
        if self._watch is not None:
            self._watch.begin(self._prefix_keys)
            if self.options.prefix_cache:
                self._memories.watch_keys()
        selector = self.loop.selector
        self._workforce = Workforce(
            *(self._launch, selector, self._router, self.recorder, self._memories.order),
            self,
            self._warn,
        )
        self.contexts = Contexts(self, self._clock, self._warn, options.contexts_stay)
        """Whether the workers' contexts are on the device."""
        try:
            if launch is None:
                self._launch.start_workers()
            while self._launch.workers:
                self._workforce.adopt(self._launch.workers.pop(0))
            self._workforce.connect_remotes()
            if not self.options.hold_load:
                self._read_facts()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what users of a replica call ------------------------------------------------------------

    @property
    def error(self) -> ColdframeError | None:
        """Why the replica cannot go on, where that is so."""
        return self._error

    @property
    def idle(self) -> bool:
        """Whether no request is open."""
        return self._router.open_requests == 0 and (self._gate is None or self._gate.open)

    @property
    def spec(self) -> ModelSpec:
        """The model's shape.

        Raises:
            ReplicaError: It is not known yet: its config is still on the way.
        """
        return self.model.spec

    @property
    def known(self) -> bool:
        """Whether the model's config has been read."""
        return self._model is not None

    @property
    def sized(self) -> bool:
        """Whether the model is known, and how much KV there is for it; workers can be told then."""
        return self.known and self.kv_bytes is not None and self._memories.all_listen

    @property
    def model(self) -> ModelFacts:
        """The model's configs and shape.

        Raises:
            ReplicaError: As `spec`.
        """
        if self._model is None:
            raise ReplicaError("the model's config is not there yet")
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether all weights are in."""
        return self._memories.loaded

    @property
    def board(self) -> BoardView | None:
        """How far the load is."""
        return self._memories.board

    @property
    def usage(self) -> dict[str, int]:
        """What the memory services said last of what is in use; see `ask_usage`."""
        return self._memories.usage

    @property
    def kv_bytes(self) -> int | None:
        """What KV takes, of several devices where it takes most; None before that is known."""
        return self._memories.kv_bytes

    @property
    def resting(self) -> RestingTogether:
        """Whether its weights are on the device."""
        return self._memories.resting

    @property
    def answered(self) -> bool:
        """Whether a token has been made."""
        return self._answered

    @property
    def calm(self) -> bool:
        """Whether no first token has to wait for what is started now."""
        if self.resigned and not self._router.waits_for("vllm"):
            return False
        return self._answered or (self.loaded and not self._router.native_requests)

    @property
    def awaits_engine(self) -> bool:
        """Whether there is to be a vLLM engine, and none has been up yet."""
        return self._workforce.awaits_engine

    @property
    def bridge(self) -> Bridge:
        """Who decodes where there is a vLLM engine beside native workers."""
        return self._workforce.bridge

    @property
    def load_s(self) -> float:
        """How long the weights have been coming, or took, in seconds."""
        if self._load_started_ns is None:
            return 0.0
        return ((self._loaded_ns or now()) - self._load_started_ns) / 1e9

    @property
    def wants_image(self) -> bool:
        """Whether there was no image for this start."""
        return self._workforce.tiers.no_image

    @property
    def wants_compiled_image(self) -> bool:
        """Whether the image of this start is one that compiled decode steps would better."""
        return self.options.graphs and self._workforce.tiers.eager_for_now

    @property
    def run_dir(self) -> str:
        return self._launch.run_dir

    @property
    def threads(self) -> int:
        """Threads of each worker's kernels."""
        return self._launch.threads

    @property
    def pids(self) -> dict[str, int]:
        """The processes by name."""
        workers = {w.name: w.child.pid for w in self._workforce.workers.values()}
        return {**self._memories.pids, **workers}

    @property
    def memory_pids(self) -> dict[str, int]:
        """Those of them that are memory services."""
        return self._memories.pids

    @property
    def prefilled_by_decode(self) -> int:
        """Requests the rest of whose prompt was left to a decode worker, so far."""
        return self._router.prefilled_by_decode

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that are still to be computed, as far as they are known."""
        return self._router.load("prefill")

    @property
    def remotes_up(self) -> int:
        """Decode workers on other hosts that are connected."""
        workers = self._workforce.workers.values()
        return sum(worker.role == "remote" and worker.up for worker in workers)

    @property
    def staff(self) -> dict[str, dict[str, int]]:
        """By role: how many workers start, are up, and are to go."""
        return self._workforce.counts

    def submit(
        self,
        params: SamplingParams,
        listener: Listener,
        *,
        prompt: str | None = None,
        prompt_ids: tuple[int, ...] | None = None,
        add_special: bool = True,
        group: str = "",
        give: bool = False,
        kv: Given | None = None,
        generated_ids: tuple[int, ...] = (),
    ) -> str:
        """Takes a request and returns its id; the answer comes to the listener during `poll`.

        Args:
            params: What is asked for.
            listener: Gets the answer.
            prompt: The prompt as text, or
            prompt_ids: as token ids.
            add_special: Whether the tokenizer puts its own tokens around the text.
            group: Of the workers that are to serve it; see `add_clones`.
            give: Whether another replica goes on with it behind its first token; see
                `coldframe.runtime.transport.base`.
            kv: What another replica has given with it.
            generated_ids: Tokens of the answer that the client has from elsewhere, behind
                `prompt_ids`: it goes on from there. Only with `kv`, or where nobody computes
                prompts as such.

        Raises:
            ColdframeError: The replica cannot go on.
            TransferRefused: What was given is of another request.
        """
        if self._error is not None:
            raise self._error
        if kv is None and self.options.decodes_only:
            kv = Given.nothing()
        if self._load_started_ns is None:
            raise ReplicaError("nothing is being loaded yet", hint="Call start_load first.")
        if not self.known:
            raise ReplicaError("the model's config is not there yet", hint="Wait until `known`.")
        if params.needs == "vllm" and self.options.vllm is None:
            raise RequestError(
                "only a vLLM engine serves this",
                where="structured",
                hint="Start the replica with --decode vllm or --decode native,vllm.",
            )
        self.wake()
        request = self._new_request()
        go = partial(
            self._router.submit,
            *(request, params, listener),
            prompt=prompt,
            prompt_ids=prompt_ids,
            add_special=add_special,
            group=group,
            give=give,
            kv=kv,
            generated_ids=generated_ids,
        )
        if self._gate is None or self._gate.open or group:
            go()
        else:
            self._gate.hold(request, go, listener)
        return request

    def _submit_first(
        self, params: SamplingParams, listener: Listener, prompt_ids: tuple[int, ...]
    ) -> str:
        request = self._new_request()
        self._router.submit(request, params, listener, prompt_ids=prompt_ids)
        return request

    def _new_request(self) -> str:
        self._requests += 1
        return f"r{self._requests}-{os.urandom(4).hex()}"

    def cancel(self, request: str) -> None:
        if self._gate is not None:
            self._gate.cancel(request)
        if request in self._given:
            self.to_memory({"type": "release", "request": request})
        self._router.cancel(request)

    @property
    def given(self) -> int:
        """Requests that were given away, and whose KV nobody has taken yet."""
        return len(self._given)

    def start_load(self) -> None:
        """Loads a model whose load was held (`ReplicaOptions.hold_load`)."""
        self._launch.start_load()
        self._load_started_ns = now()
        self._read_facts()

    def park(self) -> None:
        """Gives the device's memory back; the next request takes it anew. It has to be idle.

        That is the memory of all KV, and of the weights where they can be kept elsewhere; then
        that of the workers' contexts, where they can be checkpointed.
        """
        self.resigned = True
        self._workforce.rest()
        self.to_memory({"type": "discard"})
        self.resting.park()
        self.contexts.leave()

    def keep(self) -> None:
        """Gets ready to be parked at once, where that takes long for the first time."""
        self.resting.keep()

    def wake(self) -> None:
        """Has contexts and weights come back, before somebody asks."""
        self.resigned = False
        self.contexts.come()  # first: they are small, and nothing runs without them
        self.resting.wake()

    def ask_usage(self) -> None:
        """Asks the memory services what is in use; a new `usage` is there after some `poll`."""
        self._memories.ask_usage()

    @property
    def imported(self) -> bool:
        """Whether all workers have their libraries, so that only the model is missing."""
        return all(worker.imported for worker in self._workforce.workers.values())

    def poll(self, timeout: float | None = None) -> None:
        """Handles what has happened; waits for something at most so many seconds."""
        self.loop.poll(self.wait_s if timeout is None else min(timeout, self.wait_s))
        self.step()

    @property
    def wait_s(self) -> float:
        """How long nothing is to be done unless something happens, in seconds."""
        waits = (self.resting.wait_s, self.contexts.wait_s)
        tick_s = max(0.0, self._next_tick - time.monotonic())
        return min([tick_s, *(wait for wait in waits if wait is not None)])

    def step(self) -> None:
        """What there is to do after something has happened; where others poll the loop."""
        self._workforce.catch_up()
        self.resting.tick()
        self.contexts.step()
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + 1.0
            self._router.tick()
            self._memories.watch()
            self._workforce.tick(self._load_started_ns)

    def connect_memory(self, device: str) -> Channel:
        """A connection to the memory service of a device, for whoever is to be attached to it.

        Raises:
            ReplicaError: It does not listen.
        """
        memory = next(memory for memory in self._launch.memories if memory.device == device)
        return Channel.connect(memory.path)

    def run_until(self, done: Callable[[], bool]) -> None:
        """Polls until something is so.

        Raises:
            ColdframeError: The replica cannot go on.
        """
        while not done():
            if self._error is not None:
                raise self._error
            self.poll()

    def add_clones(
        self, snapshot: SnapshotOptions, group: str, lost: Callable[[ColdframeError], None]
    ) -> None:
        """Starts a prefill and a decode worker from one image, for the requests of their group.

        Args:
            snapshot: The image; nothing stands in for it.
            group: See `submit`.
            lost: Called when there is no clone, or none any more.

        Raises:
            ColdframeError: They cannot be started.
        """
        self._workforce.add_group(snapshot, group, lost)

    def remove_clones(self, group: str) -> None:
        """Ends the workers of a group."""
        self._workforce.remove_group(group)

    def close(self) -> None:
        """Ends all processes and removes what they had."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.lost()
        self._workforce.close()
        self._memories.close()
        self._launch.close()
        if self._own_loop:
            self.loop.close()
        sweep_run_dirs(self.options.run_dir)

    # -- Transport, for the router ---------------------------------------------------------------

    def to_worker(self, worker: str, message: dict[str, Any]) -> None:
        self._workforce.send(worker, message)

    def to_memory(self, message: dict[str, Any]) -> None:
        self._memories.send(message)

    def kill(self, worker: str) -> None:
        self._workforce.kill(worker)

    def offer(self, request: str, handoff: Handoff) -> None:
        offered = {
            "request": request,
            "attempt": handoff.job.attempt,
            "written": blocks_of(handoff.kv_tokens),
            "kv_tokens": handoff.kv_tokens,
            "fingerprint": handoff.fingerprint,
            "kv_format": handoff.kv_format,
            "ttl_s": self.options.transfer.ttl_s,
        }
        self._memories.offer(handoff.domain, offered)

    # -- ContextsOwner ---------------------------------------------------------------------------

    @property
    def workers(self) -> Mapping[str, WorkerProcess]:
        here = self._workforce.workers
        return {name: worker for name, worker in here.items() if worker.role != "remote"}

    def device_of(self, role: str) -> str:
        return self.options.device_of(role)

    def weights_left(self, role: str) -> bool:
        return self._memories.has_left(self.device_of(role))

    def order(
        self, role: str, message: dict[str, Any], done: Callable[[dict[str, Any]], None]
    ) -> None:
        self._memories.order(self.device_of(role), message, done)

    def bury(self, worker: str, why: str) -> None:
        self._workforce.kill(worker, why)

    # -- Owner, for the memory services ----------------------------------------------------------

    def _read_facts(self) -> None:
        """Reads the model's configs here and now where they lie in a directory.

        For any other model, the memory service tells where it has put them.
        """
        facts = facts_at_hand(self.options)
        if facts is not None:
            self._take_facts(facts)

    def _take_facts(self, model: ModelFacts) -> None:
        if self._model is not None:
            return
        self._model = model
        if not model.spec.native or self.options.vllm_serves_all:
            self._workforce.leave_all_to_vllm()
        self._memories.size_kv(model, self.options)
        self._router.reopen()
        self.memory_listens()

    def _settle(self) -> None:
        """Lets the memory services do, once, what would have delayed the first token."""
        if self.loaded and self._answered and not self._settled:
            self._settled = True
            self.to_memory({"type": "settle", "realign": self.options.realign})

    def memory_listens(self) -> None:
        """Tells the workers what they are to be, once memory service and model are known."""
        if self._model is not None:
            self._workforce.tell(self._model, self._memories.listening)

    def memory_has_files(self, path: str, tensors: list[list[Any]] | None) -> None:
        stored = None
        if tensors is not None:
            stored = {name: StoredTensor(dtype, shape) for name, dtype, shape in tensors}
        try:
            self._take_facts(ModelFacts(path, stored, vllm=self.options.vllm_alone))
        except ColdframeError as error:
            self.fail(error)

    def memory_has_keys(self, stored: list[str], removed: list[str]) -> None:
        if self._watch is not None:
            self._watch.changed(stored, removed)

    def _prefix_keys(self) -> PrefixKeys | None:
        """What names KV blocks of this model; None while that is not known."""
        fingerprint = self.facts.get("fingerprint")
        if fingerprint is None or self._model is None or not self.spec.native:
            return None
        layout = kv_format(self.spec.dtype)
        return PrefixKeys(fingerprint, layout, BLOCK_TOKENS, self.spec.rope)

    def memory_is_loaded(self) -> None:
        if self.loaded and self._loaded_ns is None:
            self._loaded_ns = now()
        self._settle()

    def memory_died(self, why: str) -> None:
        workers = self._workforce.workers.values()
        clones = any(w.cloner is not None and not w.group for w in workers)
        fresh_will_do = self.options.snapshot.mode != "require"
        if clones and fresh_will_do and "snapshot" not in self.facts:
            # None was up yet, and a restore may be what it died of.
            why = f"the memory service died while workers were restored: {why}"
            self.recorder.add("snapshot_restore", self._load_started_ns or now(), note=why)
            options = replace(self.options, snapshot=SnapshotOptions("off"), hold_load=False)
            self._start_over(why, options)
            tiers = self._workforce.tiers
            tiers.why, tiers.failed = [why], why
            return
        self._memories.forget()
        self.fail(
            ReplicaError(
                "the memory service died",
                got=why,
                hint="What it said, if anything, is on standard error. Start again.",
            )
        )

    def memory_offered(self, request: str, ticket: dict[str, Any] | None) -> None:
        given = self._router.offered(request, None if ticket is None else Ticket.from_wire(ticket))
        if given and ticket is not None:
            self._given.add(request)
        else:
            self.to_memory({"type": "release", "request": request})

    def memory_offer_over(self, request: str, *, taken: bool) -> None:
        self._given.discard(request)
        self.to_memory({"type": "release", "request": request})

    # -- Owner, for the workers ------------------------------------------------------------------

    def fail(self, error: ColdframeError) -> None:
        if self._error is not None:
            return
        if not self._closed:
            way = self.faults.way_on(error, self.options, answered=self._answered)
            if way is not None:
                self._start_over(*way)
                return
        self._error = error
        self._router.fail_all(error)
        if self._gate is not None:
            self._gate.fail(error)

    def add_spans(self, wire: list[list[Any]]) -> None:
        """Takes spans of a process."""
        self.spans += [Span.from_wire(data) for data in wire]

    def is_up(self, worker: WorkerProcess) -> None:
        if worker.group:
            return
        tiers = self._workforce.tiers
        found = self.facts.setdefault("snapshot", {"tier": None, "image": None})
        found |= {"why": "; ".join(tiers.why) or None, "failed": tiers.failed}
        if worker.role == "vllm":
            tiers, cloner = self._workforce.engine_tiers, worker.cloner
            found["engine"] = {
                "tier": "fresh" if cloner is None else cloner.tier,
                "image": None if cloner is None else cloner.image,
                "why": "; ".join(tiers.why) or None,
                "failed": tiers.failed,
            }
        if worker.role == "prefill":
            cloner = worker.cloner
            found["tier"] = "fresh" if cloner is None else cloner.tier
            found["image"] = None if cloner is None else cloner.image
            if not self.loaded or self.idle:
                self._workforce.start_rest()
            if self._gate is not None:
                self._gate.is_up(worker, self.spec.vocab_size)

    def heard(self, worker: WorkerProcess, message: Message) -> None:
        if message.kind == "tokens" and not self._answered:
            self._answered = True
            self._workforce.start_rest()
            self._settle()
        elif message.kind == "saturation":
            self.facts["prefill_batch"] = {name: message.body[name] for name in _SATURATION}
        elif message.kind == "rested":
            body = message.body
            self.contexts.rested(worker.name, body["number"], body["own_bytes"])
            return
        self._router.on_message(worker.name, message.body)

    def died(self, worker: WorkerProcess, code: int) -> bool:
        if self._error is not None:
            return True
        if code != -signal.SIGBUS or self.facts.get("mode") != "mapped":
            return False
        # What is in the other workers' mappings is not to be trusted either.
        self._start_over(
            "a weight file shrank under a worker that had it mapped",
            replace(self.options, copy=True, hold_load=False),
            worker,
        )
        return True

    def hear_memory(self) -> None:
        self._memories.hear_end()

    def _distrust(self, error: ColdframeError) -> None:
        if self._error is None:  # else that is why there was no answer
            self._workforce.distrust(error)

    def _start_over(
        self, why: str, options: ReplicaOptions, dead: WorkerProcess | None = None
    ) -> None:
        """All processes anew.

        Open requests go on in the new ones, from the tokens that their clients have seen.

        Args:
            why: What for.
            options: What the replica is to be from now on.
            dead: A worker that has been reaped already.
        """
        self._given.clear()  # their KV ends with the memory service
        gone = self._workforce.close()
        if dead is not None:
            gone.append(dead.name)
        self._memories.close()
        self._launch.close()
        self._router.workers_gone(gone, why)
        self.options = options
        self._load_started_ns = now()
        try:
            self._begin(None)
        except ColdframeError as error:
            self.fail(error)
        else:
            self.facts["restarted"] = why
