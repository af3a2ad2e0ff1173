"""The front's side of contexts that leave a GPU behind the weights, and come back with them.

A worker that rests has a context on its device, which takes hundreds of megabytes. The memory
service can have it leave (`loader.memory_service.contextdesk`), once the worker has let go of all
that it shares:

    here ── rest ─> asked ── rested ─> ready ── checkpoint ─> leaving ── checkpointed ─> away
    here <──────────────── restored ── coming <── restore ──────────────────────────────── away
                                         └── no room ─> waiting ── restore, again and again ─┘

What was ordered last counts, and each step is waited for before the next. A worker's own messages
may come whenever they like: what it does on its device waits until it is back. So who is told to
come back comes back, even where all is to leave again by then: it may hold up the weights. Of one
device's workers one leaves at a time, those that the next answer needs first last of all.

What goes wrong costs a worker at most, never an answer. One that could not be frozen stays as it
was. One whose context is lost is killed, and its successor starts fresh. Where contexts cannot be
checkpointed at all, or two were lost on their way out, they stay, and the reason is told once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coldframe.loader.errors import (
    ColdframeError,
    ContextPoisoned,
    DeviceFull,
    NoCheckpoint,
    ReplicaError,
)
from coldframe.runtime.replica.contexts_owner import ContextsOwner
from coldframe.runtime.replica.worker_context import Place, WorkerContext

__all__ = ["Contexts"]

_AGAIN_S = 0.25
_PATIENCE_S = 30.0
"""For how long the device's memory may be others' while a context is to come back, in seconds, and
for how long a worker may hold on to what it is to let go of."""
_MOST_LOST = 2
"""Workers that are lost while they leave, until none is asked any more."""
_SILENCE_S = 60.0
"""How long a memory service may take over one order, in seconds."""


class Contexts:
    """Where the contexts of a replica's workers are, and where they are wanted.

    Args:
        owner: See there.
        clock: Seconds, monotonic.
        warn: Told why they cannot leave.
        why: Why they are not to leave at all; None where they may.
    """

    def __init__(
        self,
        owner: ContextsOwner,
        clock: Callable[[], float],
        warn: Callable[[str], None] = lambda _: None,
        why: str | None = None,
    ) -> None:
        self.why = why
        """Why contexts stay where they are, once that is known."""
        self.told: dict[str, Any] = {}
        """What was said last of the way there: `bytes` and `seconds` of all together."""
        self._owner = owner
        self._clock = clock
        self._warn = warn
        self._away = False
        self._rests = 0
        self._lost = 0
        self._numbers = 0
        self._known: dict[str, WorkerContext] = {}
        self._warned: set[str] = set()

    # -- orders ----------------------------------------------------------------------------------

    def leave(self) -> None:
        """Has them leave, each as soon as the weights have left its device."""
        self._away = True
        self._rests += 1
        self.told = {}

    def come(self) -> None:
        """Has those come back that have left."""
        if not self._away:
            return
        self._away = False
        for context in self._contexts():
            if context.place in ("asked", "ready"):
                context.goes("here")  # and an answer is late
            elif context.place == "leaving":
                context.must_come = True
            elif context.place == "away":
                self._bring_back(context)

    # -- how far that is -------------------------------------------------------------------------

    @property
    def left(self) -> bool:
        """Whether all have left, so that others may have what they took."""
        found = self._contexts()
        return self._away and bool(found) and all(c.place == "away" for c in found)

    @property
    def leaving(self) -> bool:
        """Whether some are on their way, or about to be."""
        return self._away and any(
            context.place in ("asked", "ready", "leaving") or self._may_leave(context)
            for context in self._contexts()
        )

    @property
    def status(self) -> dict[str, Any] | None:
        """How far that is, as JSON values; None where they are to be here."""
        if not self._away:
            return None
        places = list(self.places.values())
        return {
            "away": places.count("away"),
            "of": len(places),
            "bytes": self.told.get("bytes", 0),
            "seconds": self.told.get("seconds", 0.0),
            "why": self.why,
        }

    @property
    def places(self) -> dict[str, Place]:
        """Where each worker's is, by the worker's name."""
        return {context.worker.name: context.place for context in self._contexts()}

    @property
    def wait_s(self) -> float | None:
        """How long nothing is to be done, in seconds; None where that is up to others."""
        times = [context.due for context in self._known.values() if context.due is not None]
        return max(0.0, min(times) - self._clock()) if times else None

    def step(self) -> None:
        """What there is to do after something has happened, or when `wait_s` is over."""
        for context in self._contexts():
            if context.due is not None and self._clock() >= context.due:
                self._is_due(context)
            elif self._away and self._may_leave(context):
                self._numbers += 1
                context.number = self._numbers
                context.goes("asked", self._clock() + _PATIENCE_S)
                order = {"type": "rest", "number": context.number}
                self._owner.to_worker(context.worker.name, order)
        for context in reversed(self._contexts()):
            if context.place == "ready" and not self._one_leaves(context.worker.role):
                self._take_off(context)

    def _may_leave(self, context: WorkerContext) -> bool:
        return (
            self.why is None
            and context.place == "here"
            and context.failed != self._rests
            and self._owner.weights_left(context.worker.role)
        )

    def _one_leaves(self, role: str) -> bool:
        device = self._owner.device_of(role)
        leaving = [c.worker.role for c in self._known.values() if c.place == "leaving"]
        return any(self._owner.device_of(other) == device for other in leaving)

    def _contexts(self) -> list[WorkerContext]:
        """Those of the workers that are up now; first those of prefill."""
        workers = [w for w in self._owner.workers.values() if w.up and not w.group]
        workers.sort(key=lambda worker: worker.role != "prefill")
        known = self._known
        self._known = {w.name: known.get(w.name) or WorkerContext(w) for w in workers}
        return list(self._known.values())

    def _is_due(self, context: WorkerContext) -> None:
        """Its place has lasted for as long as it may."""
        match context.place:
            case "asked":
                self._stays(context, ReplicaError("a worker does not let go of its device"))
            case "waiting":
                self._bring_back(context)
            case _:  # the driver does not come back, and would not for another one
                context.goes(context.place)
                why = f"the memory service did not answer for {_SILENCE_S:g} s"
                self._give_up(why)
                self._lose(context, why)

    def _give_up(self, why: str) -> None:
        """No context leaves any more."""
        self.why = why
        for context in self._known.values():
            if context.place in ("asked", "ready"):
                context.goes("here")

    def _lose(self, context: WorkerContext, why: str) -> None:
        self._warn(f"a worker is lost with its context: {why}")
        self._owner.bury(context.worker.name, why)

    # -- away ------------------------------------------------------------------------------------

    def rested(self, worker: str, number: int, own_bytes: int) -> None:
        """A worker has let go of all that it shares, and has so much of the device for itself."""
        context = self._known.get(worker)
        if context is not None and context.place == "asked" and context.number == number:
            context.own_bytes = own_bytes
            context.goes("ready")

    def _take_off(self, context: WorkerContext) -> None:
        context.must_come = False
        context.goes("leaving", self._clock() + _SILENCE_S)
        worker = context.worker
        order = {"type": "checkpoint", "name": worker.name, "pid": worker.child.pid}
        order["own_bytes"] = context.own_bytes
        self._owner.order(worker.role, order, lambda body: self._left(context, body))

    def _left(self, context: WorkerContext, body: dict[str, Any]) -> None:
        if context.worker.name not in self._owner.workers:
            return
        if body["error"] is not None:
            error = ColdframeError.from_wire(body["error"])
            if isinstance(error, ReplicaError):  # it is dead, which its own socket will say
                context.goes("here")
                context.failed = self._rests
            else:
                self._stays(context, error)
            return
        context.goes("away")
        context.frozen = {name: body[name] for name in ("bytes", "uuids")}
        before = self.told.get("bytes", 0), self.told.get("seconds", 0.0)
        self.told = {"bytes": before[0] + body["bytes"], "seconds": before[1] + body["seconds"]}
        if context.must_come:
            self._bring_back(context)

    def _stays(self, context: WorkerContext, error: ColdframeError) -> None:
        context.failed = self._rests
        context.goes("here")
        if isinstance(error, ContextPoisoned):
            self._lost += 1
        if isinstance(error, NoCheckpoint) or self._lost >= _MOST_LOST:
            # Another one would fare no better. One that is lost may have been bad luck.
            self._give_up(str(error))
        if isinstance(error, ContextPoisoned):
            self._lose(context, str(error))
        else:
            why = f"a context stays on its device: {error}"
            if why not in self._warned:  # what fails each time is told once
                self._warned.add(why)
                self._warn(why)

    # -- back ------------------------------------------------------------------------------------

    def _bring_back(self, context: WorkerContext) -> None:
        if context.place != "waiting":
            context.since = self._clock()
        context.goes("coming", self._clock() + _SILENCE_S)
        worker, frozen = context.worker, context.frozen or {}
        order = {"type": "restore", "name": worker.name, "pid": worker.child.pid, **frozen}
        self._owner.order(worker.role, order, lambda body: self._back(context, body))

    def _back(self, context: WorkerContext, body: dict[str, Any]) -> None:
        if context.worker.name not in self._owner.workers:
            return
        if body["error"] is None:
            context.frozen = None
            context.goes("here")
            return
        error = ColdframeError.from_wire(body["error"])
        moment = self._clock()
        if isinstance(error, DeviceFull) and moment - context.since <= _PATIENCE_S:
            context.goes("waiting", moment + _AGAIN_S)
        else:
            context.goes("away")
            self._lose(context, str(error))
