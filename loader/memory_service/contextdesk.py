"""The memory service's desk for workers' contexts: orders to freeze one and to thaw it again.

The service is the helper that a driver wants for that: alive as long as its workers, with a context
of its own that is up. How it is done is known a floor above (`snapshot.cuda`) and handed in. Orders
are carried out one after the other, as they came, by a thread of their own: one takes as long as
copying what a context has, and the loop never waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from coldframe.loader.errors import ColdframeError, DeviceError, NoCheckpoint
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.memory_service.reporter import Reporter
from coldframe.loader.timeline import Recorder, now

# What only a service needs that has been given an order.
if TYPE_CHECKING:
    from queue import SimpleQueue

    from coldframe.loader.devices.base import Device

__all__ = ["ContextDesk", "Contexts", "Frozen", "OpenContexts"]

LOCK_S = 5.0
"""How long a worker may take to come to rest, in seconds: it was asked to, and has answered."""
_CLOSING_S = 1.0
_ANSWERS = {"probe": "probed", "checkpoint": "checkpointed", "restore": "restored"}


@dataclass(frozen=True, slots=True)
class Frozen:
    """A context that is in its process's host memory.

    Args:
        bytes: What it takes of the device when it comes back, or somewhat more.
        uuids: What each GPU is called, by its UUID; the one that the process computes on first.
        seconds: How long it took to get there.
    """

    bytes: int
    uuids: Mapping[str, str]
    seconds: float = 0.0


class Contexts(Protocol):
    """What freezes and thaws; see `snapshot.cuda.Checkpoints`. For several threads."""

    def freeze(self, pid: int, limit_s: float, own_bytes: int) -> Frozen: ...

    def thaw(self, pid: int, frozen: Frozen) -> float: ...

    def supported(self) -> str | None: ...

    def close(self) -> None: ...


OpenContexts = Callable[["Device"], Contexts]
"""Makes that for a device; raises NoCheckpoint where there is nothing to be frozen on it."""


class ContextDesk:
    """Answers every message about contexts; each order is answered once.

    Args:
        reactor: The loop.
        reporter: Tells the owner.
        device: The service's.
        recorder: Gets a span for each order.
        open_contexts: See `OpenContexts`; None where nobody has handed it in.
    """

    def __init__(
        self,
        reactor: Reactor,
        reporter: Reporter,
        device: Callable[[], Device],
        recorder: Recorder,
        open_contexts: OpenContexts | None,
    ) -> None:
        self._reactor = reactor
        self._reporter = reporter
        self._device = device
        self._recorder = recorder
        self._open_contexts = open_contexts
        self._contexts: Contexts | None = None
        self._orders: SimpleQueue[Callable[[], None] | None] | None = None
        self._thread: threading.Thread | None = None

    def close(self) -> bool:
        """Waits a moment for what is under way. Whether it is over, so that the device may go.

        What is not is ended with this process, and whoever has the workers ends them, too.
        """
        if self._orders is not None and self._thread is not None:
            self._orders.put(None)
            self._thread.join(_CLOSING_S)
            if self._thread.is_alive():
                return False
        if self._contexts is not None:
            self._contexts.close()
        return True

    # -- messages --------------------------------------------------------------------------------

    def on_probe(self, connection: Connection, name: str) -> None:
        """Says whether contexts can be checkpointed, before anything is done for that: `probed`."""

        def ask(contexts: Contexts) -> dict[str, Any]:
            why = contexts.supported()
            if why is not None:
                raise NoCheckpoint("contexts cannot be checkpointed", got=why)
            return {}

        self._begin(connection, "probe", name, ask, {})

    def on_checkpoint(self, connection: Connection, name: str, pid: int, own_bytes: int) -> None:
        """Has a worker's context leave the device: answered by `checkpointed`.

        Nothing is sent to the worker until that is over. It would map weights that come back, also
        between the driver's lock and its checkpoint, which is refused then, or goes wrong.
        """

        def freeze(contexts: Contexts) -> dict[str, Any]:
            found = contexts.freeze(pid, LOCK_S, own_bytes)
            return {"bytes": found.bytes, "uuids": dict(found.uuids), "seconds": found.seconds}

        nothing = {"bytes": 0, "uuids": {}, "seconds": 0.0}
        self._begin(connection, "checkpoint", name, freeze, nothing)

    def on_restore(
        self, connection: Connection, name: str, pid: int, bytes: int, uuids: dict[str, str]
    ) -> None:
        """Has it come back: answered by `restored`."""

        def thaw(contexts: Contexts) -> dict[str, Any]:
            return {"bytes": bytes, "seconds": contexts.thaw(pid, Frozen(bytes, uuids))}

        self._begin(connection, "restore", name, thaw, {"bytes": bytes, "seconds": 0.0})

    def _begin(
        self,
        connection: Connection,
        order: str,
        name: str,
        work: Callable[[Contexts], dict[str, Any]],
        nothing: dict[str, Any],
    ) -> None:
        connection.require_owner("moves contexts")

        if order == "checkpoint":
            self._reactor.hold(name, True)

        def run() -> None:
            started = now()
            error: ColdframeError | None = None
            found = nothing
            try:
                found = work(self._opened())
            except ColdframeError as failure:
                error = failure
            except Exception as failure:  # noqa: BLE001 - who waits must hear of it
                error = DeviceError("the context's way broke", where=name, got=repr(failure))
            self._reactor.post(lambda: self._ended(order, name, started, found, error))

        if self._orders is None:
            from queue import SimpleQueue

            self._orders = SimpleQueue()
            self._thread = threading.Thread(
                target=_follow, args=(self._orders,), name="contexts", daemon=True
            )
            self._thread.start()
        self._orders.put(run)

    def _opened(self) -> Contexts:
        if self._contexts is None:
            if self._open_contexts is None:
                raise NoCheckpoint("nobody here knows how to checkpoint a context")
            self._contexts = self._open_contexts(self._device())
        return self._contexts

    def _ended(
        self,
        order: str,
        name: str,
        started: int,
        found: dict[str, Any],
        error: ColdframeError | None,
    ) -> None:
        if order == "checkpoint":
            self._reactor.hold(name, False)
        if order != "probe":
            said = f"{found['bytes']:,} bytes" if error is None else str(error)
            self._recorder.add(f"cuda_{order}", started, note=f"{name}: {said}")
        body = {
            "type": _ANSWERS[order],
            "name": name,
            "error": error and error.to_wire(),
        }
        self._reporter.tell(body | found)


def _follow(orders: SimpleQueue[Callable[[], None] | None]) -> None:
    """The thread: carries orders out as they came, until there is None."""
    while (order := orders.get()) is not None:
        order()
