"""A replica: its processes started all at once, watched, replaced when they die, and cleared away.

The memory service starts first, since nothing beats the bytes; the workers import torch while the
weights stream. Everything that follows is events: messages, deaths, the clock.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from coldframe.loader.awake import AwakeClock
from coldframe.loader.board import BoardView
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.kvtally import StoreUsage
from coldframe.loader.process import sweep_run_dirs
from coldframe.loader.timeline import Recorder, Span, now
from coldframe.loader.wire import Message
from coldframe.runtime.device_faults import DeviceFaults
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.gate import Gate
from coldframe.runtime.launch import Launch, WorkerProcess
from coldframe.runtime.loop import Loop
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.prefix import kv_format
from coldframe.runtime.resting import Resting
from coldframe.runtime.router import Listener, Router
from coldframe.runtime.sizing import KvSize, ModelFacts, StoredTensor, facts_at_hand
from coldframe.runtime.workforce import Workforce, ending

__all__ = ["Replica"]

USAGE = ("kv_used", "kv_cached", "kv_total", "kv_reused", "bytes_done", *StoreUsage.names())

_SATURATION = ("tokens", "threads")
_MEMORY_END_S = 1.0
"""For how long a memory service that has left a worker is given to end."""
_MEMORY_SILENCE_S = 30.0
"""How long the memory service may leave a question unanswered, in seconds: its loop does nothing
that takes long, and the workers wait for it."""
_SEND_TIMEOUT_S = 10


class Replica:
    """A model being served by processes of its own.

    Args:
        options: What it is to be.
        recorder: Gets the front's spans; `spans` has those of all processes.
        launch: Its processes, where they were started before this module was imported.
        loop: Whose it is to call, where others use it too; it stays open then.
        warn: Told where it does not go as it was asked for: on the CPU instead of a GPU.

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
    ) -> None:
        self.options = options
        self.recorder = recorder or Recorder("front")
        self.spans: list[Span] = []
        self.loop = loop or Loop()
        self._own_loop = loop is None
        self._error: ColdframeError | None = None
        self._next_tick = 0.0
        self._requests = 0
        self._load_started_ns = None if options.hold_load else now()
        self._closed = False
        self._clock = AwakeClock()
        self._warn = warn
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
        self.facts: dict[str, Any] = {"device": options.device, "device_why": options.device_why}
        """What the memory service said of the load: `mode`, `why`, `verified`, `weights_bytes`.
        Beside it `device` and `device_why`, on a GPU `gpu` with its `name`, `total` and `free`
        bytes, `snapshot`, and `prefill_batch`, once it is measured."""
        self.board: BoardView | None = None
        """How far the load is."""
        self.usage: dict[str, int] = {}
        """What the memory service said last of what is in use; see `ask_usage`."""
        self.resting = Resting(self.to_memory, self.fail, self._clock, self._warn)
        """Whether its weights are on the device."""
        self.loaded = False
        self._loaded_ns: int | None = None
        self._answered = False
        self._settled = False
        self._listening = False
        self._model: ModelFacts | None = None
        self.kv_bytes: int | None = None
        """What KV takes; None before that is known."""
        self._files: str | None = None
        self._tensors: list[list[Any]] | None = None
        self._launch = launch or Launch(self.options, self.recorder)
        self._memory, self._memory_child = self._launch.memory, self._launch.memory_child
        self._memory.set_send_timeout(_SEND_TIMEOUT_S)
        self._memory_heard = self._clock()
        self._memory_fd: int | None = self._memory.fileno()
        self.loop.watch(self._memory_fd, self._on_memory)
        selector = self.loop.selector
        self._workforce = Workforce(self._launch, selector, self._router, self.recorder, self)
        try:
            if launch is None:
                self._launch.start_workers()
            while self._launch.workers:
                self._workforce.adopt(self._launch.workers.pop(0))
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
    def model(self) -> ModelFacts:
        """The model's configs and shape.

        Raises:
            ReplicaError: As `spec`.
        """
        if self._model is None:
            raise ReplicaError("the model's config is not there yet")
        return self._model

    @property
    def answered(self) -> bool:
        """Whether a token has been made."""
        return self._answered

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
        return {"memory": self._memory_child.pid, **workers}

    @property
    def prefilled_by_decode(self) -> int:
        """Requests the rest of whose prompt was left to a decode worker, so far."""
        return self._router.prefilled_by_decode

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
    ) -> str:
        """Takes a request and returns its id; the answer comes to the listener during `poll`.

        Args:
            params: What is asked for.
            listener: Gets the answer.
            prompt: The prompt as text, or
            prompt_ids: as token ids.
            add_special: Whether the tokenizer puts its own tokens around the text.
            group: Of the workers that are to serve it; see `add_clones`.

        Raises:
            ColdframeError: The replica cannot go on.
        """
        if self._error is not None:
            raise self._error
        if self._load_started_ns is None:
            raise ReplicaError("nothing is being loaded yet", hint="Call start_load first.")
        if not self.known:
            raise ReplicaError("the model's config is not there yet", hint="Wait until `known`.")
        self.wake()
        request = self._new_request()
        go = partial(
            self._router.submit,
            *(request, params, listener),
            prompt=prompt,
            prompt_ids=prompt_ids,
            add_special=add_special,
            group=group,
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
        self._router.cancel(request)

    def start_load(self) -> None:
        """Loads a model whose load was held (`ReplicaOptions.hold_load`)."""
        self._launch.start_load()
        self._load_started_ns = now()
        self._read_facts()

    def park(self) -> None:
        """Gives the device's memory back; the next request takes it anew. It has to be idle.

        That is the memory of all KV, and of the weights where they can be kept elsewhere.
        """
        self.to_memory({"type": "discard"})
        self.resting.park()

    def keep(self) -> None:
        """Gets ready to be parked at once, where that takes long for the first time."""
        self.resting.keep()

    def wake(self) -> None:
        """Has the weights come back, before somebody asks."""
        self.resting.wake()

    def ask_usage(self) -> None:
        """Asks the memory service what is in use; the answer is in `usage` after some `poll`."""
        self.to_memory({"type": "usage"})

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
        rest_s = self.resting.wait_s
        tick_s = max(0.0, self._next_tick - time.monotonic())
        return tick_s if rest_s is None else min(rest_s, tick_s)

    def step(self) -> None:
        """What there is to do after something has happened; where others poll the loop."""
        self._workforce.catch_up()
        self.resting.tick()
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + 1.0
            self._router.tick()
            self._watch_memory()
            self._workforce.tick(self._load_started_ns)

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
        self._workforce.close()
        self._forget_memory()
        if self.board is not None:
            self.board.close()
        self._launch.close()
        if self._own_loop:
            self.loop.close()
        sweep_run_dirs(self.options.run_dir)

    # -- Transport, for the router ---------------------------------------------------------------

    def to_worker(self, worker: str, message: dict[str, Any]) -> None:
        self._workforce.send(worker, message)

    def to_memory(self, message: dict[str, Any]) -> None:
        try:
            self._memory.send(message)
        except ReplicaError:
            # Dead, or as good as that: it does not read. Its end is read from the socket, with the
            # reason before it.
            self._memory_child.kill()

    def kill(self, worker: str) -> None:
        self._workforce.kill(worker)

    # -- the memory service ----------------------------------------------------------------------

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
        size = KvSize.of(model.spec, self.options)
        order = {
            "type": "kv",
            "block_bytes": size.block_bytes,
            "blocks": size.blocks,
            "lease_s": self.options.lease_s,
            "store": self._kv_store(model),
        }
        if size.blocks is not None:
            self.kv_bytes = size.block_bytes * size.blocks
        if size.room is not None:
            order["room"] = size.room.to_wire()
        self.to_memory(order)
        self._router.reopen()
        self._tell_workers()

    def _kv_store(self, model: ModelFacts) -> dict[str, Any] | None:
        """What the memory service is told of where KV is kept, if anywhere."""
        store = self.options.kv_store
        if store is None or not self.options.prefix_cache:
            return None
        return replace(store, kv_format=kv_format(model.spec.dtype)).to_wire()

    def _settle(self) -> None:
        """Lets the memory service do, once, what would have delayed the first token."""
        if self.loaded and self._answered and not self._settled:
            self._settled = True
            self.to_memory({"type": "settle", "realign": self.options.realign})

    def _on_files(self, path: str, tensors: list[list[Any]] | None) -> None:
        stored = None
        if tensors is not None:
            stored = {name: StoredTensor(dtype, shape) for name, dtype, shape in tensors}
        try:
            self._take_facts(ModelFacts(path, stored))
        except ColdframeError as error:
            self.fail(error)

    def _watch_memory(self) -> None:
        """Ends a memory service that hangs; to be called about once a second."""
        if self._memory_fd is None:
            return
        if self._clock() - self._memory_heard > _MEMORY_SILENCE_S:
            self._memory_child.kill()
            self._memory_died(f"it did not answer for {_MEMORY_SILENCE_S:g} s")
        else:
            self.ask_usage()  # a scrape does not wait for it, either

    def _on_memory(self) -> None:
        memory = self._memory
        messages, ended = memory.receive_ready()
        self._memory_heard = self._clock()
        for message in messages:
            if self._memory is not memory:
                return  # what it said led to a start with another one
            body = message.body
            match message.kind:
                case "listening":
                    self._listening = True
                    self._tell_workers()
                case "files":
                    self._files = body["path"]
                    if body["local"]:
                        self._on_files(self._files, None)
                    elif self._tensors is not None:
                        self._on_files(self._files, self._tensors)
                case "device":
                    self.facts["gpu"] = {name: body[name] for name in ("name", "total", "free")}
                case "sized":
                    self.kv_bytes = body["block_bytes"] * body["blocks"]
                case "plan":
                    self.board = BoardView(message.fds[0])
                    self.facts |= {"mode": body["mode"], "weights_bytes": body["weights_bytes"]}
                    self._tensors = body.get("tensors")
                    if self._tensors is not None and self._files is not None:
                        self._on_files(self._files, self._tensors)
                case "moved" | "loaded" as kind:
                    if kind == "loaded" and not self.loaded:
                        self.loaded, self._loaded_ns = True, now()
                    told = ("mode", "why", "verified", "peers_at")
                    self.facts |= {name: body[name] for name in told}
                    self.add_spans(body["spans"])
                    self._settle()
                case "kept":
                    self.facts |= {"kept": True, "kept_why_not": body["why"]}
                case "parked" | "woken" as kind:
                    self.resting.heard(kind, body)
                case "usage":
                    self.usage = {name: body[name] for name in USAGE}
                case "failed":
                    self.add_spans(body["spans"])
                    self.fail(ColdframeError.from_wire(body["error"]))
        if ended and self._memory is memory:
            self._memory_died(ending(self._memory_child.kill()))

    def _forget_memory(self) -> None:
        """Hears no more of the memory service."""
        # By its number: it may be closed already.
        if self._memory_fd is not None:
            self.loop.unwatch(self._memory_fd)
            self._memory_fd = None

    def _memory_died(self, why: str) -> None:
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
        self._forget_memory()
        self.fail(
            ReplicaError(
                "the memory service died",
                got=why,
                hint="What it said, if anything, is on standard error. Start again.",
            )
        )

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
        memory, deadline = self._memory, time.monotonic() + _MEMORY_END_S
        with selectors.DefaultSelector() as readable:
            readable.register(memory.fileno(), selectors.EVENT_READ)
            # Its end is an error, or a start with another one.
            while self._error is None and self._memory is memory:
                if not readable.select(max(0.0, deadline - time.monotonic())):
                    return
                self._on_memory()

    def _distrust(self, error: ColdframeError) -> None:
        if self._error is None:  # else that is why there was no answer
            self._workforce.distrust(error)

    def _tell_workers(self) -> None:
        """Tells the workers what they are to be, once memory service and model are known."""
        if self._listening and self._model is not None:
            self._workforce.tell(self._model)

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
        gone = self._workforce.close()
        if dead is not None:
            gone.append(dead.name)
        self._forget_memory()
        if self.board is not None:
            self.board.close()
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
