"""The workers of a replica: told what to be, listened to, replaced when they die.

A worker is started in the best way that is left (`tiers`). A clone that cannot be made, or dies
before it is up, is replaced by a worker that starts in the next best way; one that dies later, by
another like it, unless that happens again and again.

Workers of a *group* other than "" are there for that group's requests alone, as on trial. None of
them is replaced: whoever wanted them is told.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from coldframe.loader.errors import (
    ColdframeError,
    DeviceError,
    DeviceFull,
    DeviceLost,
    MemoryServiceGone,
    NoDevice,
    ReplicaError,
    SnapshotError,
)
from coldframe.loader.timeline import Recorder, clock_shift_ns, now
from coldframe.loader.wire import Channel, Message
from coldframe.runtime.graphs.shelf import GraphShelf, Trial
from coldframe.runtime.options import ReplicaOptions, SnapshotOptions
from coldframe.runtime.replica.bridge import Bridge
from coldframe.runtime.replica.clones import Clones
from coldframe.runtime.replica.comebacks import Comebacks
from coldframe.runtime.replica.launch import Launch, WorkerProcess
from coldframe.runtime.replica.router import Router
from coldframe.runtime.replica.sizing import ModelFacts
from coldframe.runtime.replica.staffing import Staffing
from coldframe.runtime.replica.thaws import Order, Thaws
from coldframe.runtime.replica.tiers import Tiers
from coldframe.runtime.transport.remotes import ENGINE, ROLE, Remotes

__all__ = ["Owner", "Workforce", "ending", "init_message"]

_CRASHES = 6
_CRASH_WINDOW_S = 60.0
_START_S = {"prefill": 300.0, "decode": 300.0, "vllm": 900.0}
"""How long a worker may take to be up, in seconds: vLLM may compile the model first. One on
another host is up when that is."""
_SEND_TIMEOUT_S = 10
_PUT_OFF_NS = 1_000_000_000


class Owner(Protocol):
    """What the workers' replica wants to hear."""

    @property
    def answered(self) -> bool:
        """Whether a token has been made."""
        ...

    @property
    def calm(self) -> bool:
        """Whether no first token has to wait for what is started now."""
        ...

    @property
    def error(self) -> ColdframeError | None:
        """Why the replica cannot go on, where that is so."""
        ...

    def fail(self, error: ColdframeError) -> None:
        """The replica cannot go on as it is."""
        ...

    def add_spans(self, wire: list[list[Any]]) -> None: ...

    def is_up(self, worker: WorkerProcess) -> None:
        """A worker has come up."""
        ...

    def heard(self, worker: WorkerProcess, message: Message) -> None:
        """A worker said something that is for the router."""
        ...

    def died(self, worker: WorkerProcess, code: int) -> bool:
        """A worker that was up is dead. Whether that is taken care of."""
        ...

    def hear_memory(self) -> None:
        """Waits a moment for a memory service's end, and does what then has to be done."""
        ...


class Workforce:
    """The workers of one start of a replica.

    Args:
        launch: Starts them.
        selector: Gets their sockets.
        router: Is told who comes and goes.
        recorder: Gets a span for each clone that was lost.
        order: Has a memory service move contexts, of clones on a GPU; see `Memories.order`.
        owner: The replica.
        warn: Told why there is no vLLM engine, where one is wanted.
    """

    def __init__(
        self,
        launch: Launch,
        selector: selectors.BaseSelector,
        router: Router,
        recorder: Recorder,
        order: Order,
        owner: Owner,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.workers: dict[str, WorkerProcess] = {}
        self._launch = launch
        self._selector = selector
        self._router = router
        self._recorder = recorder
        self._owner = owner
        self._thaws = Thaws(order, self._not_thawed)
        self._crashes: deque[float] = deque()
        self._device_lost_at = -math.inf
        """When a worker has lost its device last, in seconds."""
        self._model: ModelFacts | None = None
        self._memories: set[str] = set()
        """The memory services that workers can be connected to."""
        self._closed = False
        self._vllm_alone = False
        """Whether native workers are of no use."""
        self._on_trial: dict[str, Callable[[ColdframeError], None]] = {}
        """Whom to tell of each group that it is gone."""
        self._groups: dict[str, Clones] = {}
        self._groups[""] = self._follow(launch.tiers, self._start_instead)
        self._engines: Clones | None = None
        """Those of vLLM engines, once there may be one."""
        self._shelf = GraphShelf(launch.options.snapshot, recorder)
        self.bridge = Bridge(self, router, recorder, launch.options, warn)
        vllm = launch.options.vllm
        self._comebacks = Comebacks(self.start, wanted=vllm is not None and vllm.alone)
        self.awaits_engine = vllm is not None
        """Whether there is to be a vLLM engine, and none has been up yet."""
        self._vllm = vllm
        named, listed = launch.options.remotes, launch.options.remotes_from
        self._remotes = Remotes(self, router, named, listed, recorder, warn)
        if self._remotes.fd is not None:
            selector.register(self._remotes.fd, selectors.EVENT_READ, self._on_lists)
        router.longest = None  # what another start's engine had room for
        self._staffing = Staffing(
            *(self, router, recorder, launch.options), stands_in_for=self.bridge.stands_in_for
        )

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """By role: how many workers start, are up, and are to go."""
        found = self._staffing.counts()
        options = self._launch.options
        if options.remotes or options.remotes_from:
            found[ROLE] = self._staffing.counts_of(ROLE)
        return found

    @property
    def tiers(self) -> Tiers:
        """The ways to start a worker that are left."""
        return self._groups[""].tiers

    @property
    def engine_tiers(self) -> Tiers:
        """The ways to start a vLLM engine that are left."""
        return self._launch.engine_tiers

    def close(self) -> list[str]:
        """Ends all of them: their names."""
        if self._remotes.fd is not None and not self._closed:
            self._selector.unregister(self._remotes.fd)
        self._closed = True
        self._remotes.close()
        for clones in self._all_clones():
            clones.end_idle()
        names = list(self.workers)
        for worker in self.workers.values():
            self._selector.unregister(worker.channel.fileno())
            worker.end()
        self.workers.clear()
        for clones in self._all_clones():
            clones.close()
        for lost in list(self._on_trial.values()):
            lost(ReplicaError("all processes of the replica were ended"))
        return names

    # -- starting --------------------------------------------------------------------------------

    def start(self, role: str) -> None:
        """Starts a worker in the best way that is left."""
        self.adopt(self._launch.start_worker(role))

    def start_remote(self, address: str) -> str:
        """Starts the process that stands for a decode worker on another host: its name."""
        worker = self._launch.start_remote(address)
        self.adopt(worker)
        return worker.name

    def connect_remotes(self) -> None:
        """Connects to the decode workers on other hosts that are due."""
        if not self._vllm_alone:
            self._remotes.step()

    def end_remote(self, name: str) -> None:
        """Ends the process that stands for a decode worker that is not wanted any more."""
        self._remove(self.workers[name], "it is not listed any more")

    def _on_lists(self) -> None:
        self._remotes.take()
        self.connect_remotes()

    def end(self, worker: WorkerProcess, why: str) -> None:
        """Ends a worker that has nothing to do."""
        self._remove(worker, why)

    def start_rest(self) -> None:
        """Starts those that were put off for the first token's sake."""
        roles, self._launch.later = self._launch.later, []
        try:
            for role in roles:
                self.start(role)
        except ColdframeError as error:
            self._owner.fail(error)
        self.bridge.tick(calm=self._owner.calm)

    def adopt(self, worker: WorkerProcess) -> None:
        """Takes over a worker that was started."""
        self._clones_of(worker).added(worker)
        worker.channel.set_send_timeout(_SEND_TIMEOUT_S)
        self.workers[worker.name] = worker
        self._selector.register(
            worker.channel.fileno(), selectors.EVENT_READ, lambda: self._on_message(worker)
        )
        if self._vllm_alone:
            self._end_native(worker)
        self._tell_all()

    def leave_all_to_vllm(self) -> None:
        """The model is one that native workers do not run: they go, and vLLM serves all requests.

        What a model is, is known when they have been started already, as nearly all models need.
        """
        self._vllm_alone = True
        self._launch.later = [role for role in self._launch.later if role == "vllm"]
        self._staffing.forget("prefill")
        self._router.leave_all_to("vllm")
        for worker in list(self.workers.values()):
            self._end_native(worker)

    def _end_native(self, worker: WorkerProcess) -> None:
        if worker.role != "vllm":
            self._remove(worker, "the native engine does not run this model")

    def tell(self, model: ModelFacts, memories: Collection[str]) -> None:
        """What there is to serve is known, and these memory services listen."""
        self._model, self._memories = model, set(memories)
        if self._vllm is not None and self._vllm.alone and self._router.longest is None:
            # Until it is up, and says so itself.
            self._router.longest = self._vllm.longest(model.spec)
        self._tell_all()

    def add_group(
        self, snapshot: SnapshotOptions, group: str, lost: Callable[[ColdframeError], None]
    ) -> None:
        """Starts a prefill and a decode worker for a group.

        Args:
            snapshot: How.
            group: Its name.
            lost: Called when one of them cannot be had, or is dead.
        """
        tiers = self._launch.open_tiers(snapshot)
        self._on_trial[group] = lost
        self._groups[group] = self._follow(tiers, lambda _, error: lost(error))
        for role in ("prefill", "decode"):
            self.adopt(self._launch.start_worker(role, tiers, group))

    def remove_group(self, group: str) -> None:
        """Ends the workers of a group."""
        self._on_trial.pop(group, None)
        for worker in [w for w in self.workers.values() if w.group == group]:
            self._remove(worker, "it is not needed any more")
        clones = self._groups.pop(group, None)
        if clones is not None:
            clones.close()

    def distrust(self, error: ColdframeError) -> None:
        """Has workers that start otherwise take the places of all clones."""
        for cloner in self.tiers.cloners:
            self.tiers.drop(cloner, error)
        natives = [worker for worker in self.workers.values() if worker.role != "vllm"]
        for worker in [w for w in natives if w.cloner is not None and not w.group]:
            self._note(worker, error)
            self._remove(worker, str(error))
            self._start_instead(worker, error)

    def _follow(
        self, tiers: Tiers, lost: Callable[[WorkerProcess, ColdframeError], None]
    ) -> Clones:
        def on_lost(name: str, error: ColdframeError) -> None:
            worker = self.workers.get(name)
            # The end of one that was up is read from its own socket, and it is replaced then.
            if worker is not None and (worker.restoring or worker.group):
                self._lost(worker, error, lost)

        return Clones(
            tiers,
            self._selector,
            lost=on_lost,
            started=self._on_started,
            ready=self._tell_all,
            spans=self._owner.add_spans,
        )

    def _clones_of(self, worker: WorkerProcess) -> Clones:
        """Among which clones a worker is, if it is one."""
        return self._engine_clones() if worker.role == "vllm" else self._groups[worker.group]

    def _engine_clones(self) -> Clones:
        if self._engines is None:
            self._engines = self._follow(self._launch.engine_tiers, self._start_instead)
        return self._engines

    def _all_clones(self) -> list[Clones]:
        return [*self._groups.values(), *([] if self._engines is None else [self._engines])]

    def _on_started(self, name: str) -> None:
        """A clone is there."""
        worker = self.workers.get(name)
        if worker is not None:
            self._thaw(worker)

    def _thaw(self, worker: WorkerProcess) -> None:
        """What a clone had on a GPU is to come back, as soon as its hooks have run."""
        self._thaws.begin(worker, self._launch.memory_of(worker.role).device)

    def _not_thawed(self, name: str, error: ColdframeError) -> None:
        """A clone is not to have its context."""
        worker = self.workers.get(name)
        if worker is not None:
            self._clones_of(worker).failed(worker, error)

    def _lost(
        self,
        worker: WorkerProcess,
        error: ColdframeError,
        lost: Callable[[WorkerProcess, ColdframeError], None],
    ) -> None:
        self._note(worker, error)
        self._remove(worker, str(error))
        if not self._closed:
            lost(worker, error)
            self.start_rest()

    def _note(self, worker: WorkerProcess, error: ColdframeError) -> None:
        """Keeps for the timeline why a clone is none any more."""
        asked_ns = worker.child.spawned_ns
        self._recorder.add("snapshot_restore", asked_ns, note=f"{worker.name} failed: {error}")

    def _start_instead(self, worker: WorkerProcess, _: ColdframeError) -> None:
        if self._owner.error is not None:  # nothing is left for it to do
            return
        try:
            self.start(worker.role)
        except ColdframeError as error:
            self._owner.fail(error)

    def _tell_all(self) -> None:
        model = self._model
        if model is None:
            return
        for worker in list(self.workers.values()):
            if worker.told or self._launch.memory_of(worker.role).name not in self._memories:
                continue
            if self._clones_of(worker).may_go_on(worker, model):
                self._tell(worker, model)

    def _tell(self, worker: WorkerProcess, model: ModelFacts) -> None:
        place = self._launch.memory_of(worker.role)
        try:
            # Whom a worker runs as need not be let into the run directory.
            memory = Channel.connect(place.path)
        except ReplicaError:
            # It is dead, which is told by its own socket; or alive, and out of reach for good.
            if not os.path.exists(place.path):
                self._owner.fail(_run_dir_gone(place.run_dir))
            return
        worker.told = True
        options = self._shelf.options(self._launch.options)
        if worker.role == ROLE:
            init = _remote_init(worker, options)
        else:
            init = init_message(worker.name, worker.role, options, model, self._shelf.root)
        self.send(worker.name, init, [memory.fileno()])
        memory.close()
        if worker.role == ROLE:
            return  # the router hears of it when that one is up
        role, engine = ("decode", "vllm") if worker.role == "vllm" else (worker.role, "native")
        self._router.worker_added(worker.name, role, worker.group, place.device, engine)

    # -- while they live -------------------------------------------------------------------------

    def send(self, name: str, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Sends a message to a worker, where it is there."""
        worker = self.workers.get(name)
        if worker is None:
            return
        try:
            worker.channel.send(message, fds)
        except ReplicaError:
            # Dead, or as good as that: it does not read. Its end is read from the socket, after
            # its last messages.
            worker.child.kill()

    def kill(self, name: str, why: str = "it hung") -> None:
        """Replaces a worker that hangs, or is of no use."""
        worker = self.workers.get(name)
        if worker is not None:
            self._bury(worker, why)

    def catch_up(self) -> None:
        """Handles what was heard of clones while something else was waited for."""
        for clones in self._all_clones():
            clones.catch_up()
        self._check_engines()

    def tick(self, started_ns: int | None) -> None:
        """Gives up on those who take too long to start; to be called about once a second.

        Args:
            started_ns: When there was something to start for; None while there is not.
        """
        for clones in self._all_clones():
            clones.tick()
        self._thaws.tick()
        for worker in self.workers.values():
            if worker.first_words is not None:
                # What it has started may have its socket, too, and keep that open when it is dead.
                worker.child.poll()
        if started_ns is None:
            return
        if self._launch.later and now() - started_ns > _PUT_OFF_NS:
            self.start_rest()
        self.connect_remotes()
        for worker in [w for w in self.workers.values() if w.role != ROLE]:
            patience_s = _START_S[worker.role]
            late = now() - int(patience_s * 1e9)
            if not worker.up and max(worker.child.spawned_ns, started_ns) < late:
                self._bury(worker, f"it was not up after {patience_s:g} s")
        if not self._launch.later:
            self._staffing.tick()
            self.bridge.tick(calm=self._owner.calm)
            error = self._comebacks.tick()
            if error is not None:
                self._owner.fail(error)

    def _check_engines(self) -> None:
        """Where nothing but a clone is wanted, the replica fails as soon as there can be none."""
        options = self._launch.options
        if options.vllm is None or options.snapshot.mode != "require" or self._closed:
            return
        tiers = self._engine_clones().tiers
        if tiers.best is None and self._owner.error is None:
            self._owner.fail(self._launch.no_clone("vllm", tiers))

    def rest(self) -> None:
        """Nobody is to be served for a while: what is only about to be of use is ended."""
        self.bridge.rest()

    def _is_its_own(self, error: ColdframeError, worker: WorkerProcess) -> bool:
        """Whether what broke a worker need not break the next."""
        if isinstance(error, ReplicaError) or worker.restoring or worker.role == ROLE:
            return True
        if worker.role == "vllm" and self.bridge.wanted:
            return True  # nor does it break those who decode without it
        if not isinstance(error, DeviceError) or isinstance(error, NoDevice):
            return False
        if isinstance(error, DeviceLost) and worker.trying is not None:
            return True  # the next does not try that
        if isinstance(error, DeviceLost):
            # What one process has lost may be there for the next: but not for one that was not even
            # let to it, nor where another has just lost it.
            before, self._device_lost_at = self._device_lost_at, time.monotonic()
            return worker.up and self._device_lost_at - before > _CRASH_WINDOW_S
        # A GPU that is full may have room for those who are up.
        return self._owner.answered and (worker.up or isinstance(error, DeviceFull))

    def _on_message(self, worker: WorkerProcess) -> None:
        messages, ended = worker.channel.receive_ready()
        for message in messages:
            if self._closed:
                return  # what it said led to a start with others
            match message.kind:
                case "spans":
                    self._owner.add_spans(message.body["spans"])
                case "graphs":
                    self._shelf.take(message)
                case "trying":
                    worker.trying = Trial.of(message)
                case "imported":
                    worker.imported = True
                    if worker.first_words is not None:
                        worker.first_words.end()
                    self._clones_of(worker).spoke(worker)
                    self._thaw(worker)
                case "broken":
                    error = ColdframeError.from_wire(message.body["error"])
                    if isinstance(error, MemoryServiceGone):
                        # A dying process closes one socket after the other: this worker's may have
                        # been the first. None is to be started in its place.
                        self._owner.hear_memory()
                    if self._is_its_own(error, worker):
                        worker.last_words = str(error)  # another may fare better
                    else:
                        self._owner.fail(error)
                case kind:
                    if kind == "leaving":
                        self._router.retire(worker.name)
                        self._remotes.leaves(worker.name)
                    if kind == "up" and worker.role == ROLE:
                        self._remotes.is_up(worker.name)
                        domain = f"tcp://{worker.address}"
                        self._router.worker_added(worker.name, "decode", "", domain, ENGINE)
                    if kind == "up":
                        worker.up = True
                        self.awaits_engine = self.awaits_engine and worker.role != "vllm"
                        self._owner.is_up(worker)
                    elif kind == "tokens" and not worker.group:
                        self._staffing.begin()
                    self._owner.heard(worker, message)
                    if kind == "up":
                        self.bridge.is_up(worker)
        if ended and worker.name in self.workers:
            self._bury(worker, None)

    # -- when they die ---------------------------------------------------------------------------

    def _bury(self, worker: WorkerProcess, why: str | None) -> None:
        """A worker is dead or has to be: reap it, start another, and move its requests there."""
        if worker.restoring or worker.group:
            self._bury_clone(worker, why)
            return
        code = self._reap(worker)
        end = why or worker.last_words or self._ending(worker, code)
        if worker.trying is not None:
            self._shelf.lost(worker.name, worker.trying)
        if worker.role == ROLE:
            # Whatever becomes of the replica: what it does next goes by who is there.
            self._remotes.died(worker.name, end)
        if self._owner.died(worker, code):
            return
        if worker.role == ROLE:
            self._router.worker_gone(worker.name, end)
            return
        if self._bury_engine(worker, end):
            return
        if self._staffing.replace(worker):
            self._router.worker_gone(worker.name, end)
            return
        self._crashes.append(time.monotonic())
        while self._crashes[0] < time.monotonic() - _CRASH_WINDOW_S:
            self._crashes.popleft()
        if len(self._crashes) > _CRASHES:
            self._owner.fail(
                ReplicaError(
                    "workers die again and again",
                    where=worker.name,
                    expected=f"at most {_CRASHES} ends in {_CRASH_WINDOW_S:g} s",
                    got=end,
                    hint="What they said last is on standard error.",
                )
            )
            return
        self._start_instead(worker, SnapshotError(end))
        self._router.worker_gone(worker.name, end)

    def _ending(self, worker: WorkerProcess, code: int) -> str:
        """How a worker has ended that did not say so itself."""
        if worker.first_words is None or worker.imported:
            return ending(code)
        error = worker.first_words.error(ending(code))
        # Ended by itself it would end so again; what has killed it may not.
        if code >= 0 and not self._is_its_own(error, worker):
            self._owner.fail(error)
        return str(error)

    def _bury_engine(self, worker: WorkerProcess, why: str) -> bool:
        """Whether it is settled what comes of an engine's death.

        Beside native workers these go on without it; alone, one that was not up is tried later.
        """
        try:
            if not self.bridge.died(worker, why) and not self._comebacks.died(worker, why):
                return False
        except ColdframeError as error:  # nobody is to be had who decodes
            self._owner.fail(error)
        self._router.worker_gone(worker.name, why)
        return True

    def _bury_clone(self, worker: WorkerProcess, why: str | None) -> None:
        clones = self._clones_of(worker)
        if why is None and worker.last_words is None:
            clones.wait_for_end(worker)
        code = worker.child.kill()
        clones.catch_up()
        if worker.name in self.workers:  # nobody had more to say of it
            end = why or worker.last_words or ending(code)
            clones.failed(worker, SnapshotError("a clone died", where=worker.name, got=end))

    def _remove(self, worker: WorkerProcess, why: str) -> None:
        self._reap(worker)
        if worker.role == ROLE:
            self._remotes.died(worker.name, why)
        self._router.worker_gone(worker.name, why)

    def _reap(self, worker: WorkerProcess) -> int:
        del self.workers[worker.name]
        self._clones_of(worker).spoke(worker)
        self._thaws.forget(worker.name)
        self._selector.unregister(worker.channel.fileno())
        worker.channel.close()
        code = worker.child.kill()
        if worker.first_words is not None:
            worker.first_words.end()
        return code


def init_message(
    name: str,
    role: str,
    options: ReplicaOptions,
    model: ModelFacts,
    graph_store: str | None = None,
) -> dict[str, Any]:
    """What a worker is told to be; a connection to the memory service goes beside it."""
    vllm = options.vllm if role == "vllm" else None
    return {
        "type": "init",
        "name": name,
        "role": role,
        "parent": os.getpid(),
        "model": model.directory,
        "config": model.config,
        "generation": model.generation,
        "overlap": options.overlap,
        "prefix_cache": options.prefix_cache,
        "local_prefill": options.local_prefill,
        "native": model.spec.native,
        "graphs": options.graphs,
        "graph_store": graph_store,
        "device": options.device_of(role),
        "clock_shift_ns": clock_shift_ns(),
        **({} if vllm is None else {"kv_bytes": vllm.kv_bytes, "args": dict(vllm.args)}),
    }


def _remote_init(worker: WorkerProcess, options: ReplicaOptions) -> dict[str, Any]:
    """What a process is told that stands for a decode worker on another host."""
    return {
        "type": "init",
        "name": worker.name,
        "parent": os.getpid(),
        "address": worker.address,
        "ttl_s": options.transfer.ttl_s,
    }


def _run_dir_gone(path: str) -> ReplicaError:
    return ReplicaError(
        "somebody has removed the run directory of this replica",
        where=path,
        hint="Its lock (flock) says that it is in use. Where that is not heeded, set "
        "COLDFRAME_RUN_DIR to a directory that nobody clears up.",
    )


def ending(code: int) -> str:
    """What an exit code says, in words."""
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
