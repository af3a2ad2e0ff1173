"""The memory service's desk for rest: orders to park and to wake, and the messages that follow.

Messages in:  `keep`, `park`, `wake` (from the owner), `detached` (from workers).
Messages out: `detach`, `attach`, `stage` (to workers), `parked`, `woken` (to the owner).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from coldframe.loader.devices.parked import ParkedWeights
from coldframe.loader.errors import ColdframeError, DeviceLost, ReplicaError
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.memory_service.reporter import Reporter
from coldframe.loader.timeline import Recorder, now

# What only a replica needs that rests.
if TYPE_CHECKING:
    from coldframe.loader.memory_service.parking import Parking

__all__ = ["ParkDesk"]


class ParkDesk:
    """Answers every message about weights that leave and come back; see `parking` for the rules.

    Args:
        reactor: The loop.
        reporter: Tells the owner.
        recorder: Gets a span for each way there and back.
    """

    def __init__(self, reactor: Reactor, reporter: Reporter, recorder: Recorder) -> None:
        self._reactor = reactor
        self._reporter = reporter
        self._recorder = recorder
        self._open: Callable[[], ParkedWeights] | None = None
        self._stages = 0
        self._weights: ParkedWeights | None = None
        self._parking: Parking[Connection] | None = None
        self._ordered_ns = 0

    def loaded(self, weights: Callable[[], ParkedWeights], stages: int) -> None:
        """All weights are in, so that they may leave.

        Args:
            weights: Makes what parks them, when that is first asked for.
            stages: How many there are.
        """
        self._open, self._stages = weights, stages

    @property
    def ready(self) -> list[int] | None:
        """The stages that are in; None where no weights have ever left."""
        return None if self._parking is None else self._parking.ready

    def came(self, worker: Connection) -> bool:
        """A worker has come. Whether it may have the segments now; else it gets them later."""
        return self._parking is None or self._parking.came(worker)

    def gone(self, connection: Connection) -> None:
        """A connection has ended."""
        if self._parking is not None:
            self._parking.gone(connection)

    def close(self) -> None:
        """Ends what is under way; before the arena is closed."""
        if self._parking is not None:
            self._parking.close()

    # -- messages --------------------------------------------------------------------------------

    def on_keep(self, connection: Connection) -> None:
        parking = self._ordered(connection)
        if parking is not None:
            parking.keep()

    def on_park(self, connection: Connection) -> None:
        parking = self._ordered(connection)
        if parking is None:
            self.parked(ReplicaError("weights that are not in cannot be parked"))
        else:
            self._ordered_ns = now()
            parking.park()

    def on_wake(self, connection: Connection) -> None:
        parking = self._ordered(connection)
        if parking is None:
            self.woken(None)  # they have never left
        else:
            self._ordered_ns = now()
            parking.wake()

    def on_detached(self, connection: Connection) -> None:
        if self._parking is None:
            raise ReplicaError("a worker let go of weights that it was to keep")
        self._parking.detached(connection)

    def _ordered(self, connection: Connection) -> Parking[Connection] | None:
        connection.require_owner("parks and wakes")
        if self._parking is None and self._open is not None:
            from coldframe.loader.memory_service.parking import Parking

            self._weights = self._open()
            workers = self._reactor.workers
            self._parking = Parking(self._weights, self._stages, self, self._reactor.post, workers)
        return self._parking

    # -- what parking has done -------------------------------------------------------------------

    def detach(self, worker: Connection) -> None:
        self._reactor.send(worker, {"type": "detach"})

    def attach(self, worker: Connection) -> None:
        assert self._weights is not None
        self._reactor.send_segments(worker, "attach", self._weights.segments)

    def stage(self, worker: Connection, stage: int) -> None:
        self._reactor.send(worker, {"type": "stage", "stage": stage})

    def parked(self, error: ColdframeError | None) -> None:
        self._tell("parked", error)

    def woken(self, error: ColdframeError | None) -> None:
        self._tell("woken", error)

    def lost(self, error: DeviceLost) -> None:
        self._reporter.fail(error)

    def _tell(self, what: str, error: ColdframeError | None) -> None:
        body: dict[str, Any] = {"type": what, "error": error and error.to_wire()}
        if self._weights is not None:
            note, seconds = self._weights.note, (now() - self._ordered_ns) / 1e9
            body |= {"left": self._weights.leaves, "seconds": seconds, "note": note}
            name = "weights_leave" if what == "parked" else "weights_return"
            self._recorder.add(name, self._ordered_ns, note=note if error is None else str(error))
        self._reporter.tell(body)
