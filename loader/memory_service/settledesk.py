"""The memory service's desk for weights that are in use and move: what is done behind the answers.

Somebody wants to write to a mapped file: the weights are copied out of the way. The first token is
out (`settle`): there is time to lay badly aligned weights out anew, and to hold a mapped file
against its seal. One of these goes on at a time, in a thread of its own; see `movable` for how.

Messages in:  `settle` (from the owner), `remapped` (from workers).
Messages out: `remap`, `relaid` (to workers), `moved` (to the owner).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from coldframe.loader.arena import Segment
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices.base import Arena
from coldframe.loader.errors import ColdframeError, DeviceError
from coldframe.loader.loads.movable import MovableWeights
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.reactor import Reactor
from coldframe.loader.memory_service.reporter import Reporter
from coldframe.loader.timeline import Recorder, now

__all__ = ["SettleDesk"]


class SettleDesk:
    """Moves the weights of one load.

    Args:
        reactor: The loop.
        reporter: Tells the owner.
        recorder: Gets a span for each way.
        facts: Says what the owner is told of the weights.
        check_proven: Called when they may have become known to be the right ones.
    """

    def __init__(
        self,
        reactor: Reactor,
        reporter: Reporter,
        recorder: Recorder,
        *,
        facts: Callable[[], dict[str, Any]],
        check_proven: Callable[[], None],
    ) -> None:
        self._reactor = reactor
        self._reporter = reporter
        self._recorder = recorder
        self._facts = facts
        self._check_proven = check_proven
        self._weights: MovableWeights | None = None
        self._wished: bool | None = None
        """Whether a better layout is wished; None before the first token."""
        self._moving = False
        self._moved: Callable[[], None] | None = None
        """What is done once no worker has the old place mapped."""

    def loaded(self, weights: MovableWeights) -> None:
        """They are in, and may move from now on."""
        self._weights = weights
        self.check_lease()

    def check_lease(self) -> None:
        """Looks whether somebody wants to write to a mapped file, and moves the weights then."""
        weights = self._free()
        if weights is None or weights.mode == "copied" or not weights.writer_waits:
            return
        # A large model takes seconds to copy; requests go on meanwhile.
        self._start("move", self._move_out, weights)

    def gone(self) -> None:
        """A connection has ended, and has nothing mapped any more."""
        self._finish_move()

    # -- messages --------------------------------------------------------------------------------

    def on_settle(self, client: Connection, realign: bool) -> None:
        """The first token is out: now there is time for what would have delayed it.

        Badly aligned weights are laid out as kernels want them, where that is wished; a mapped
        file that could not be checked before it was used is held against its seal.
        """
        client.require_owner("says when the first token is out")
        self._wished = realign
        self._settle()

    def on_remapped(self, client: Connection) -> None:
        client.remapping = False
        self._finish_move()

    # -- one way at a time -----------------------------------------------------------------------

    def _free(self) -> MovableWeights | None:
        """The weights, where they may be moved now."""
        if self._moving or self._reporter.failure is not None:
            return None
        return self._weights

    def _settle(self) -> None:
        """Does what was wished, unless the weights are on the way elsewhere: then, after that."""
        weights, realign = self._free(), self._wished
        if weights is None or realign is None:
            return
        if realign and weights.may_realign:
            self._start("settle", self._realign, weights)
        elif weights.must_verify:
            self._start("settle", self._verify, weights)

    def _start(
        self, name: str, work: Callable[[MovableWeights], None], weights: MovableWeights
    ) -> None:
        self._moving = True

        def run() -> None:
            try:
                work(weights)
            except ColdframeError as error:
                # Where it was a writer's way: he is held back still, as long as the kernel does
                # that, or until the last of those who have the files mapped is gone: they must not
                # compute with new bytes.
                failure = error
                self._reactor.post(lambda: self._reporter.fail(failure))

        threading.Thread(target=run, name=name, daemon=True).start()

    def _move_out(self, weights: MovableWeights) -> None:
        segments = weights.move_out()
        self._reactor.post(lambda: self._moved_out_now(weights, segments))

    def _moved_out_now(self, weights: MovableWeights, segments: list[Segment]) -> None:
        weights.adopt(segments)
        self._send_to_all("remap", {}, segments, weights.let_go)

    def _verify(self, weights: MovableWeights) -> None:
        started = now()
        weights.verify()
        self._recorder.add("verify", started)
        self._reactor.post(self._verified_now)

    def _verified_now(self) -> None:
        self._moving = False
        self._reporter.tell({"type": "moved", **self._facts()})
        self._check_proven()
        self.check_lease()
        self._settle()  # it may have been ended early

    def _realign(self, weights: MovableWeights) -> None:
        started = now()
        try:
            plan, arena = weights.realign()
        except DeviceError:
            self._reactor.post(self._not_realigned)
            return
        self._recorder.add("realign", started)
        self._reactor.post(lambda: self._realigned_now(weights, plan, arena))

    def _not_realigned(self) -> None:
        self._moving = False
        self._wished = False
        self.check_lease()
        self._settle()

    def _realigned_now(self, weights: MovableWeights, plan: Plan, arena: Arena) -> None:
        weights.adopt_layout(plan, arena)
        self._check_proven()
        self._send_to_all("relaid", {"plan": plan.to_wire()}, weights.segments, weights.retire)

    # -- what workers have mapped ----------------------------------------------------------------

    def _send_to_all(
        self,
        kind: str,
        body: dict[str, Any],
        segments: list[Segment],
        done: Callable[[], None],
    ) -> None:
        """Tells the workers where the weights are now; `done` once none uses the old place."""
        self._moved = done
        self._reporter.tell({"type": "moved", **self._facts()})
        workers = self._reactor.workers
        # All of them first: one may turn out to be dead while another is told.
        for worker in workers:
            worker.remapping = True
        for worker in workers:
            self._reactor.send_segments(worker, kind, segments, body)
        self._finish_move()

    def _finish_move(self) -> None:
        if self._moved is None or any(c.remapping for c in self._reactor.connections):
            return
        done, self._moved, self._moving = self._moved, None, False
        done()
        self._settle()
