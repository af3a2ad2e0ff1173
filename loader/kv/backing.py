"""The memory behind KV blocks: an arena that grows as blocks are given out, and is given back."""

from __future__ import annotations

import os
from typing import Any

from coldframe.loader.arena import Segment
from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.errors import DeviceFull, RequestError
from coldframe.loader.kv.room import KvRoom
from coldframe.loader.memory_service.connection import Connection
from coldframe.loader.memory_service.reactor import Reactor

__all__ = ["KvBacking", "blocks_that_fit"]

STEP_VARIABLE = "COLDFRAME_KV_STEP"
"""Names the bytes by which the arena grows at once, where it does."""
_STEP = 256 << 20


class KvBacking:
    """The arena of the blocks, and what workers are told of it. All methods are the loop's.

    Args:
        reactor: Has the workers.
        block_bytes: Of one block.

    Attributes:
        arena: Where the blocks are, once there are any.
        blocks: How many there may be.
        full: Why the arena could not grow when it last should have.
    """

    def __init__(self, reactor: Reactor, block_bytes: int) -> None:
        self._reactor = reactor
        self.block_bytes = block_bytes
        self.blocks = 0
        self.arena: Arena | None = None
        self.full: DeviceFull | None = None
        self._offered = False
        """Whether the workers have been told of the arena."""
        step = os.environ.get(STEP_VARIABLE, "")
        self._step = int(step) if step.isascii() and step.isdecimal() else _STEP

    def open(self, device: Device, blocks: int) -> Arena:
        """Makes the arena, without memory yet, for so many blocks.

        Raises:
            ColdframeError: There can be none.
        """
        self.blocks = blocks
        self.arena = device.arena("kv", self.block_bytes * blocks, now=False)
        return self.arena

    def offer(self) -> None:
        """Gives it to all workers, and to those that come."""
        self._offered = True
        for worker in self._reactor.workers:
            self.greet(worker)

    def greet(self, worker: Connection) -> None:
        """Gives the arena to a worker, if it is offered already."""
        if self.arena is None or not self._offered:
            return
        # The first segment with it, so that who has the arena has some memory, if there is any.
        segments = self.arena.segments
        body: dict[str, Any] = {"type": "kv", "block_bytes": self.block_bytes}
        body |= {"blocks": self.blocks, "size": self.arena.size}
        body["segments"] = [segment.to_wire() for segment in segments[:1]]
        self._reactor.send(worker, body, tuple(segment.fd for segment in segments[:1]))
        for segment in segments[1:]:
            self._send_grown(worker, segment)

    def grow(self, blocks: int) -> int:
        """Puts memory behind so many blocks from the first, as far as the device has any.

        Whoever gets one of them hears of it first: messages stay in their order.

        Returns:
            How many have some.
        """
        arena = self.arena
        if arena is None:
            return 0
        missing = blocks * self.block_bytes - arena.grown
        for step in (max(missing, min(self._step, arena.size - arena.grown)), missing):
            if missing <= 0:
                break
            try:
                segment = arena.grow(step)
            except DeviceFull as error:
                self.full = error
                continue
            self.full = None
            for worker in self._reactor.workers if self._offered else []:
                self._send_grown(worker, segment)
            break
        return min(self.blocks, arena.grown // self.block_bytes)

    def discard(self) -> bool:
        """Gives the memory of all blocks back; nobody has one, so nobody looks at it.

        Returns:
            Whether the arena has to grow again for the next block.

        Raises:
            DeviceError: It cannot be given back.
        """
        if self.arena is None or not self.arena.discard():
            return False
        for worker in self._reactor.workers:
            self._reactor.send(worker, {"type": "kv_shrunk"})
        return True

    def refusal(self, count: int) -> RequestError:
        """Why so many blocks cannot be had, where the device is full."""
        assert self.full is not None
        return RequestError(
            "the device has not enough memory left for the request's KV",
            where=self.full.where,
            expected=f"{count * self.block_bytes:,} bytes",
            got=self.full.got,
            hint="Ask for fewer tokens, or free memory of the device.",
        )

    def _send_grown(self, worker: Connection, segment: Segment) -> None:
        body = {"type": "kv_grown", "segment": segment.to_wire()}
        self._reactor.send(worker, body, (segment.fd,))


def blocks_that_fit(device: Device, room: KvRoom, block_bytes: int) -> int:
    """How many blocks there is room for, beside the weights, which have theirs.

    Raises:
        DeviceFull: None.
    """
    found = device.report()
    count = room.nbytes(found.total, found.free, 0) // block_bytes
    if count < 1:
        raise DeviceFull(
            "the weights leave no room for KV",
            where=device.name,
            expected=f"at least {block_bytes:,} bytes",
            got=f"{found.free:,} of {found.total:,} bytes free",
            hint="Take a smaller model or another device, or say how much with --kv-memory.",
        )
    return count
