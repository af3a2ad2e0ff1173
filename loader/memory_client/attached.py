"""The weights' arena as a worker has it mapped: where they are, when they leave, where they go."""

from __future__ import annotations

import os
from collections.abc import Callable

from coldframe.loader.arena import Segment
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices.base import Mapping
from coldframe.loader.timeline import now
from coldframe.loader.wire import Message

__all__ = ["AttachedWeights"]


class AttachedWeights:
    """What the memory service has said of the weights, and what of it is mapped.

    Messages are taken by one thread; what replaces or detaches the mapping is for the thread that
    computes, between two steps. The caller sees to it that neither looks at half a change.

    Args:
        reserve: Makes the mapping of an arena: its size, and whether it is the one that workers
            have addresses for, or another to go to from there.

    Attributes:
        plan: How they lie; None until it has come.
        mapping: Their addresses here, likewise.
        mode: See `Weights.mode`.
        is_mapped: Whether something is behind the addresses.
        came_away: Whether they were away when the plan came, so that there is nothing to map yet.
        is_unwanted: Whether the service wants the device's memory of them for others.
    """

    def __init__(self, reserve: Callable[[int, bool], Mapping]) -> None:
        self._reserve = reserve
        self.plan: Plan | None = None
        self.mapping: Mapping | None = None
        self.mode = ""
        self.is_mapped = False
        self.came_away = False
        self.is_unwanted = False
        self._segments: list[Segment] = []
        self._attached: tuple[int, int] | None = None
        self._relaid: tuple[Plan, Mapping] | None = None
        self._old: Mapping | None = None

    # -- what comes ------------------------------------------------------------------------------

    def planned(self, message: Message) -> None:
        """Takes the plan, and keeps addresses."""
        body = message.body
        self.plan = Plan.from_wire(body["plan"])
        self.mode, self.came_away = body["mode"], body["away"]
        self.mapping = self._reserve(self.plan.arena_bytes, True)

    def map(self, message: Message) -> list[tuple[int, int]] | None:
        """Takes segments, and maps them when all have come.

        Mapping over a mapping is one step for every other thread: a forward pass that runs
        meanwhile reads the same bytes from either.

        Returns:
            The offset and length of each; None where some are to come still.
        """
        if not self._collect(message):
            return None
        assert self.mapping is not None
        started = now()
        ranges = self._attach(self.mapping)
        self.is_mapped = True
        if message.kind == "attach":
            self._attached = (started, now())
        return ranges

    def lay_out(self, message: Message) -> None:
        """Takes segments of the weights as they are laid out anew; see `take_relaid`."""
        if not self._collect(message):
            return
        plan = Plan.from_wire(message.body["plan"])
        mapping = self._reserve(plan.arena_bytes, False)
        try:
            self._attach(mapping)
        except BaseException:
            mapping.close()
            raise
        mapping.populate(0, plan.arena_bytes)
        self._relaid = (plan, mapping)

    def _collect(self, message: Message) -> bool:
        """Takes segments; whether these were the last of them."""
        self._segments += [
            Segment.from_wire(fd, data)
            for fd, data in zip(message.fds, message.body["segments"], strict=True)
        ]
        return bool(message.body["last"])

    def _attach(self, mapping: Mapping) -> list[tuple[int, int]]:
        segments, self._segments = self._segments, []
        try:
            mapping.attach(segments)
        finally:
            for segment in segments:
                os.close(segment.fd)
        return [(segment.offset, segment.length) for segment in segments]

    # -- what is done with it --------------------------------------------------------------------

    @property
    def holds_something(self) -> bool:
        """Whether memory of the device that others have is mapped here, or about to be."""
        return bool(self._segments) or (self.mapping is not None and self.mapping.attached)

    def take_attached(self) -> tuple[int, int] | None:
        """From when to when weights that had left were mapped again, once (CLOCK_MONOTONIC)."""
        attached, self._attached = self._attached, None
        return attached

    def take_relaid(self) -> tuple[Plan, Mapping] | None:
        """The weights at other addresses, where they have been laid out anew, once.

        They are the weights from then on; `close_old` is to follow.
        """
        relaid, self._relaid = self._relaid, None
        if relaid is not None:
            self._old = self.mapping
            self.plan, self.mapping = relaid
        return relaid

    def close_old(self) -> bool:
        """Unmaps what `take_relaid` has replaced. Whether there was anything."""
        old, self._old = self._old, None
        if old is not None:
            old.close()
        return old is not None

    def close(self) -> None:
        """Unmaps everything, which nobody may touch any more."""
        for mapping in (self.mapping, self._old, self._relaid and self._relaid[1]):
            if mapping is not None:
                mapping.close()
