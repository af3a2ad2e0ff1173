"""A replica: its processes started all at once, watched, replaced when they die, and cleared away.

The memory service starts first, since nothing beats the bytes; the workers import torch while the
weights stream. Everything that follows is events: messages, deaths, the clock.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coldframe.loader.board import BoardView
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.location import Directory, parse_location
from coldframe.loader.process import sweep_run_dirs
from coldframe.loader.timeline import Recorder, Span, now, time_namespace
from coldframe.runtime.engine.params import SamplingParams
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.launch import Launch, WorkerProcess
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.router import Listener, Router
from coldframe.runtime.sizing import ModelFacts, StoredTensor, kv_blocks

__all__ = ["Replica"]

_CRASHES = 6
_CRASH_WINDOW_S = 60.0
_START_S = 300.0
_SEND_TIMEOUT_S = 10


class Replica:
    """A model being served by processes of its own.

    Args:
        options: What it is to be.
        recorder: Gets the front's spans; `spans` has those of all processes.
        launch: Its processes, where they were started before this module was imported.

    Use it as a context manager, or call `close`: it leaves nothing behind.

    Raises:
        ColdframeError: The model cannot be served. Nothing is left running then.
    """

    def __init__(
        self,
        options: ReplicaOptions,
        recorder: Recorder | None = None,
        launch: Launch | None = None,
    ) -> None:
        self.options = options
        self.recorder = recorder or Recorder("front")
        self.spans: list[Span] = []
        self._selector = selectors.DefaultSelector()
        self._workers: dict[str, WorkerProcess] = {}
        self._crashes: deque[float] = deque()
        self._error: ColdframeError | None = None
        self._next_tick = 0.0
        self._requests = 0
        self._load_started_ns = None if options.hold_load else now()
        self._closed = False
        self._router = Router(self, time.monotonic)
        self._begin(launch)

    def _begin(self, launch: Launch | None) -> None:
        """Starts the processes, or takes over those that were started."""
        self.facts: dict[str, Any] = {}
        """What the memory service said of the load: `mode`, `why`, `verified`, `weights_bytes`."""
        self.board: BoardView | None = None
        """How far the load is."""
        self.loaded = False
        self._answered = False
        self._settled = False
        self._listening = False
        self._model: ModelFacts | None = None
        self._files: str | None = None
        self._tensors: list[list[Any]] | None = None
        self._launch = launch or Launch(self.options, self.recorder)
        self._memory, self._memory_child = self._launch.memory, self._launch.memory_child
        self._selector.register(self._memory.fileno(), selectors.EVENT_READ, self._on_memory)
        try:
            if launch is None:
                self._launch.start_workers()
            while self._launch.workers:
                self._adopt(self._launch.workers.pop(0))
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
        return self._router.open_requests == 0

    @property
    def spec(self) -> ModelSpec:
        """The model's shape.

        Raises:
            ReplicaError: It is not known yet: its config is still on the way.
        """
        if self._model is None:
            raise ReplicaError("the model's config is not there yet")
        return self._model.spec

    @property
    def known(self) -> bool:
        """Whether the model's config has been read."""
        return self._model is not None

    @property
    def pids(self) -> dict[str, int]:
        """The processes by name."""
        workers = {worker.name: worker.child.pid for worker in self._workers.values()}
        return {"memory": self._memory_child.pid, **workers}

    def submit(
        self,
        params: SamplingParams,
        listener: Listener,
        *,
        prompt: str | None = None,
        prompt_ids: tuple[int, ...] | None = None,
    ) -> str:
        """Takes a request and returns its id; the answer comes to the listener during `poll`.

        Raises:
            ColdframeError: The replica cannot go on.
        """
        if self._error is not None:
            raise self._error
        if self._load_started_ns is None:
            raise ReplicaError("nothing is being loaded yet", hint="Call start_load first.")
        if not self.known:
            raise ReplicaError("the model's config is not there yet", hint="Wait until `known`.")
        self._requests += 1
        request = f"r{self._requests}-{os.urandom(4).hex()}"
        self._router.submit(request, params, listener, prompt=prompt, prompt_ids=prompt_ids)
        return request

    def cancel(self, request: str) -> None:
        self._router.cancel(request)

    def start_load(self) -> None:
        """Loads a model whose load was held (`ReplicaOptions.hold_load`)."""
        self._launch.start_load()
        self._load_started_ns = now()
        self._read_facts()

    @property
    def imported(self) -> bool:
        """Whether all workers have their libraries, so that only the model is missing."""
        return all(worker.imported for worker in self._workers.values())

    def poll(self, timeout: float | None = None) -> None:
        """Handles what has happened; waits for something at most so many seconds."""
        limit = max(0.0, self._next_tick - time.monotonic())
        for key, _ in self._selector.select(limit if timeout is None else min(timeout, limit)):
            # Handling one may have ended the process at the other end of the next.
            if self._selector.get_map().get(key.fd) == key:
                key.data()
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + 1.0
            self._router.tick()
            self._kill_late_starters()

    def run_until(self, done: Callable[[], bool]) -> None:
        """Polls until something is so.

        Raises:
            ColdframeError: The replica cannot go on.
        """
        while not done():
            if self._error is not None:
                raise self._error
            self.poll()

    def close(self) -> None:
        """Ends all processes and removes what they had."""
        if self._closed:
            return
        self._closed = True
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()
        self._launch.close()
        self._selector.close()
        sweep_run_dirs(self.options.run_dir)

    # -- Transport, for the router ---------------------------------------------------------------

    def to_worker(self, worker: str, message: dict[str, Any]) -> None:
        found = self._workers.get(worker)
        if found is not None:
            self._send(found, message)

    def to_memory(self, message: dict[str, Any]) -> None:
        try:
            self._memory.send(message)
        except ReplicaError:  # its end is read from the socket, with the reason before it
            return

    def kill(self, worker: str) -> None:
        found = self._workers.get(worker)
        if found is not None:
            self._bury(found, "it hung")

    # -- the memory service ----------------------------------------------------------------------

    def _read_facts(self) -> None:
        """Reads the model's configs here and now where they lie in a directory.

        For any other model, the memory service tells where it has put them.
        """
        if not self.options.sources and isinstance(parse_location(self.options.model), Directory):
            self._take_facts(ModelFacts(self.options.model))

    def _take_facts(self, model: ModelFacts) -> None:
        if self._model is not None:
            return
        self._model = model
        block_bytes, blocks = kv_blocks(model.spec, self.options.kv_bytes)
        self.to_memory(
            {
                "type": "kv",
                "block_bytes": block_bytes,
                "blocks": blocks,
                "lease_s": self.options.lease_s,
            }
        )
        self._init_workers()

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
            self._fail(error)

    def _on_memory(self) -> None:
        messages, ended = self._memory.receive_ready()
        for message in messages:
            body = message.body
            match message.kind:
                case "listening":
                    self._listening = True
                    self._init_workers()
                case "files":
                    self._files = body["path"]
                    if body["local"]:
                        self._on_files(self._files, None)
                    elif self._tensors is not None:
                        self._on_files(self._files, self._tensors)
                case "plan":
                    self.board = BoardView(message.fds[0])
                    self.facts |= {"mode": body["mode"], "weights_bytes": body["weights_bytes"]}
                    self._tensors = body.get("tensors")
                    if self._tensors is not None and self._files is not None:
                        self._on_files(self._files, self._tensors)
                case "moved" | "loaded" as kind:
                    self.loaded = self.loaded or kind == "loaded"
                    told = ("mode", "why", "verified", "peers_at")
                    self.facts |= {name: body[name] for name in told}
                    self._add_spans(body["spans"])
                    self._settle()
                case "kept":
                    self.facts |= {"kept": True, "kept_why_not": body["why"]}
                case "failed":
                    self._add_spans(body["spans"])
                    self._fail(ColdframeError.from_wire(body["error"]))
        if ended:
            self._selector.unregister(self._memory.fileno())
            code = self._memory_child.kill()
            self._fail(
                ReplicaError(
                    "the memory service died",
                    got=_ending(code),
                    hint="What it said, if anything, is on standard error. Start again.",
                )
            )

    # -- workers ---------------------------------------------------------------------------------

    def _add_worker(self, role: str) -> None:
        self._adopt(self._launch.start_worker(role))

    def _adopt(self, worker: WorkerProcess) -> None:
        channel = worker.channel
        channel.set_send_timeout(_SEND_TIMEOUT_S)
        self._workers[worker.name] = worker
        self._selector.register(
            channel.fileno(), selectors.EVENT_READ, lambda: self._on_worker(worker)
        )
        if self._listening and self._model is not None:
            self._init(worker, self._model)

    def _init_workers(self) -> None:
        """Tells the workers what they are to be, once memory service and model are known."""
        if self._listening and self._model is not None:
            for worker in self._workers.values():
                self._init(worker, self._model)

    def _init(self, worker: WorkerProcess, model: ModelFacts) -> None:
        self._send(
            worker,
            {
                "type": "init",
                "name": worker.name,
                "role": worker.role,
                "parent": os.getpid(),
                "model": model.directory,
                "config": model.config,
                "generation": model.generation,
                "memory": os.path.join(self._launch.run_dir, "memory.sock"),
                "overlap": self.options.overlap,
                "time_namespace": time_namespace(),
            },
        )
        self._router.worker_added(worker.name, worker.role)

    def _send(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        try:
            worker.channel.send(message)
        except ReplicaError:
            # Dead, or as good as that: it does not read. Its end is read from the socket, after
            # its last messages.
            worker.child.kill()

    def _on_worker(self, worker: WorkerProcess) -> None:
        messages, ended = worker.channel.receive_ready()
        for message in messages:
            match message.kind:
                case "spans":
                    self._add_spans(message.body["spans"])
                case "imported":
                    worker.imported = True
                case "clock":
                    self._send(worker, {"type": "clock", "now": now()})
                case "broken":
                    error = ColdframeError.from_wire(message.body["error"])
                    if isinstance(error, ReplicaError):
                        worker.last_words = str(error)  # another may fare better
                    else:
                        self._fail(error)
                case kind:
                    worker.up = worker.up or kind == "up"
                    if kind == "tokens" and not self._answered:
                        self._answered = True
                        self._settle()
                    self._router.on_message(worker.name, message.body)
        if ended and worker.name in self._workers:
            self._bury(worker, None)

    def _bury(self, worker: WorkerProcess, why: str | None) -> None:
        """A worker is dead or has to be: reap it, start another, and move its requests there."""
        del self._workers[worker.name]
        self._selector.unregister(worker.channel.fileno())
        worker.channel.close()
        code = worker.child.kill()
        if self._error is not None:
            return
        self._crashes.append(time.monotonic())
        while self._crashes[0] < time.monotonic() - _CRASH_WINDOW_S:
            self._crashes.popleft()
        ending = why or worker.last_words or _ending(code)
        if code == -signal.SIGBUS and self.facts.get("mode") == "mapped":
            self._start_over(worker)
        elif len(self._crashes) > _CRASHES:
            self._fail(
                ReplicaError(
                    "workers die again and again",
                    where=worker.name,
                    expected=f"at most {_CRASHES} ends in {_CRASH_WINDOW_S:g} s",
                    got=ending,
                    hint="What they said last is on standard error.",
                )
            )
        else:
            self._add_worker(worker.role)
            self._router.worker_gone(worker.name, ending)

    def _start_over(self, dead: WorkerProcess) -> None:
        """A file shrank under a worker that had it mapped: all processes anew, with a copy.

        What is in the other workers' mappings is not to be trusted either. Open requests go on in
        the new processes, from the tokens that their clients have seen.
        """
        why = "a weight file shrank under a worker that had it mapped"
        gone = [dead, *self._workers.values()]
        for worker in self._workers.values():
            self._selector.unregister(worker.channel.fileno())
            worker.end()
        self._workers.clear()
        if self._memory.fileno() in self._selector.get_map():
            self._selector.unregister(self._memory.fileno())
        if self.board is not None:
            self.board.close()
        self._launch.close()
        self._router.workers_gone([worker.name for worker in gone], why)
        self.options = replace(self.options, copy=True, hold_load=False)
        self._load_started_ns = now()
        try:
            self._begin(None)
        except ColdframeError as error:
            self._fail(error)
        else:
            self.facts["restarted"] = why

    def _kill_late_starters(self) -> None:
        if self._load_started_ns is None:
            return
        late = now() - int(_START_S * 1e9)
        for worker in list(self._workers.values()):
            if not worker.up and max(worker.child.spawned_ns, self._load_started_ns) < late:
                self._bury(worker, f"it was not up after {_START_S:g} s")

    def _fail(self, error: ColdframeError) -> None:
        if self._error is None:
            self._error = error
            self._router.fail_all(error)

    def _add_spans(self, wire: list[list[Any]]) -> None:
        self.spans += [Span.from_wire(data) for data in wire]


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
