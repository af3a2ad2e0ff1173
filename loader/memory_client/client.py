"""A worker's side of the memory service: the arenas mapped, the stages awaited, KV blocks got."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE, Segment
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices import Device, open_device
from coldframe.loader.devices.base import Mapping
from coldframe.loader.errors import ColdframeError
from coldframe.loader.kv.ledger import Blocks
from coldframe.loader.memory_client.attached import AttachedWeights
from coldframe.loader.memory_client.link import Link
from coldframe.loader.memory_client.populating import Populator, ranges_of
from coldframe.loader.memory_client.stall import STALL_S, StallWatch
from coldframe.loader.memory_service.board import BoardView, Progress
from coldframe.loader.wire import Channel, Message

__all__ = ["KvArena", "MemoryClient", "STALL_S"]

_ASK_AGAIN_S = 0.9


class KvArena:
    """The KV blocks' memory.

    Args:
        reservation: Its addresses here. Those of a block have memory behind them from when it is
            assigned or claimed.
        block_bytes: Bytes of one block.
        blocks: How many there are.

    Attributes:
        grown: Bytes that have memory behind them here, from the start.
    """

    def __init__(self, reservation: Mapping, block_bytes: int, blocks: int) -> None:
        self.grown = 0
        self.reservation = reservation
        self.block_bytes = block_bytes
        self.blocks = blocks

    @property
    def nbytes(self) -> int:
        """What all blocks take."""
        return self.block_bytes * self.blocks

    def attach(self, fds: Sequence[int], segments: Sequence[list[Any]]) -> None:
        """Maps segments behind what is there; the descriptors are closed."""
        found = [Segment.from_wire(fd, data) for fd, data in zip(fds, segments, strict=True)]
        try:
            self.reservation.attach(found)
        finally:
            for fd in fds:
                os.close(fd)
        self.grown = max((segment.offset + segment.length for segment in found), default=0)

    def detach(self) -> None:
        """Nothing is behind the addresses any more."""
        self.grown = 0
        self.reservation.detach()


class MemoryClient:
    """The connection of one worker.

    A thread of its own reads what the service sends. The methods block until the answer is in,
    and raise what the service reports, or ReplicaError once it is gone; none waits for ever.

    Args:
        channel: A connection to the service's socket. It is this object's to close.
        name: The worker's, for messages.
        on_event: Called from the reading thread whenever something has changed: a stage, free
            blocks, an error.
        stall_s: See `STALL_S`.
        reserved: The arenas' addresses, where this process has kept them free for them. Then no
            other address will do. They are this object's to use, and to give back.
        device: Where the arenas are, and this worker computes; None is the CPU.
    """

    def __init__(
        self,
        channel: Channel,
        name: str,
        *,
        on_event: Callable[[], None] = lambda: None,
        stall_s: float = STALL_S,
        reserved: Iterable[Mapping] = (),
        device: Device | None = None,
    ) -> None:
        self.device = device or open_device("cpu")
        """Where the arenas are."""
        self.kv: KvArena | None = None
        self.lost_why: ColdframeError | None = None
        """Why KV was lost that was to be brought from another replica last."""
        self._reserved = {reservation.address: reservation for reservation in reserved}
        self._on_event = on_event
        self._link = Link(channel, self._take, on_event, stall_s)
        self._stall = StallWatch(stall_s)
        self._weights = AttachedWeights(self._map_weights)
        self._arrived: set[int] = set()
        self._populated: set[int] = set()
        self._refused = False
        self._refused_at = 0.0
        self._bringing: set[str] = set()
        """Requests whose KV is on its way from another replica."""
        self._board: BoardView | None = None
        self._populator = Populator(lambda: self.weights, self._entered)
        self._link.start()
        self._link.send({"type": "hello", "name": name})

    def hang_up(self) -> None:
        """Ends the connection; whoever waits for something gets an error. Any thread may do it."""
        self._link.hang_up()

    def close(self) -> None:
        """Ends the connection and unmaps the arenas, which nobody may touch any more.

        A worker need not: its end does it. Not to be called from `on_event`.
        """
        self._end()
        self._weights.close()
        if self.kv is not None:
            self.kv.reservation.close()

    def leave(self) -> None:
        """Ends the connection and lets the arenas' memory go; their addresses stay reserved.

        For a process that is to be frozen: nobody may look at the arenas any more, nor on the
        device. Not to be called from `on_event`.
        """
        self._end()
        if self.weights is not None:
            self.weights.detach()
        if self.kv is not None:
            self.kv.reservation.detach()

    def _end(self) -> None:
        self._link.hang_up()
        self._link.join()
        self._populator.close()
        self._link.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    # -- what has come ---------------------------------------------------------------------------

    @property
    def plan(self) -> Plan | None:
        """How the weights lie, once that is known."""
        return self._weights.plan

    @property
    def weights(self) -> Mapping | None:
        """Where they are mapped, likewise."""
        return self._weights.mapping

    @property
    def error(self) -> ColdframeError | None:
        """Why nothing more will come, where that is so."""
        return self._link.error

    @property
    def progress(self) -> Progress:
        return Progress(0, 0) if self._board is None else self._board.progress

    def is_ready(self, stage: int) -> bool:
        """Whether a stage's weights are in.

        Raises:
            ColdframeError: They will not come: the stream failed or the service died.
        """
        if stage in self._arrived and stage in self._populated:
            return True
        if self._link.error is not None:
            raise self._link.error
        return False

    @property
    def complete(self) -> bool:
        """Whether all weights are in.

        Raises:
            ColdframeError: They will not come: the stream failed or the service died.
        """
        return self.plan is not None and all(
            self.is_ready(stage.index) for stage in reversed(self.plan.stages)
        )

    def wait_arenas(self) -> tuple[Plan, Mapping, KvArena]:
        """Waits until the weights' arena and the KV's are mapped here.

        Where the weights are away, their addresses are there, and nothing behind them yet.
        """
        self._wait(lambda: self._has_weights and self.kv is not None, "the load plan")
        assert self.plan is not None
        assert self.weights is not None
        assert self.kv is not None
        return self.plan, self.weights, self.kv

    def wait_weights(self) -> tuple[Plan, Mapping]:
        """Waits until the weights' arena is mapped here; see `wait_arenas`."""
        self._wait(lambda: self._has_weights, "the load plan")
        assert self.plan is not None
        assert self.weights is not None
        return self.plan, self.weights

    @property
    def _has_weights(self) -> bool:
        return self._weights.is_mapped or self._weights.came_away

    def wait_stage(self, stage: int) -> None:
        """Waits until a stage's weights are in."""
        self._wait(lambda: self.is_ready(stage), f"stage {stage}")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        self._stall.begin()
        with self._link.changed:
            while not done():
                if self._link.error is not None:
                    raise self._link.error
                self.check_stalled(what)
                self._link.changed.wait(min(self._stall.stall_s / 4, 1.0))

    def check_stalled(self, what: str | None = None) -> None:
        """For whoever waits for weights by its own means: call it now and then.

        Args:
            what: What is waited for, for the message.

        Raises:
            SourceUnreachable: Nothing has come in for too long.
        """
        self._stall.check(self.progress, what)

    # -- weights that move, or leave -------------------------------------------------------------

    def take_relaid(self) -> tuple[Plan, Mapping] | None:
        """The weights at other addresses, where the service has laid them out anew.

        Call `let_go_of_old` once nothing of this process looks at the old ones any more.
        """
        return self._weights.take_relaid()

    def let_go_of_old(self) -> None:
        """Unmaps the weights at their old addresses."""
        if self._weights.close_old():
            self._link.send({"type": "remapped"})

    @property
    def is_to_let_go(self) -> bool:
        """Whether the service wants the device's memory of the weights for others."""
        return self._weights.is_unwanted

    @property
    def away(self) -> bool:
        """Whether there is nothing behind the weights' addresses."""
        return not self._weights.is_mapped

    @property
    def holds_nothing(self) -> bool:
        """Whether nothing of a device's memory that others have is mapped here, or about to be.

        That is so from when the weights have left and the KV's memory was given back. Messages
        keep their order, so that it stays so until the service has been told otherwise.
        """
        kv = self.kv is not None and self.kv.reservation.attached
        return not kv and not self._weights.holds_something

    def let_go(self) -> None:
        """Unmaps the weights; no stage is ready from then on. They come back to the same place.

        Nothing of this process may look at them, nor on the device.
        """
        assert self.weights is not None
        with self._link.changed:
            self._arrived.clear()
            self._populated.clear()
            self._weights.is_unwanted = self._weights.is_mapped = False
        self.weights.detach()
        self._link.send({"type": "detached"})

    def take_attached(self) -> tuple[int, int] | None:
        """From when to when weights that had left were mapped again, once (CLOCK_MONOTONIC)."""
        return self._weights.take_attached()

    # -- KV --------------------------------------------------------------------------------------

    def open(self, request: str) -> None:
        """Brings a request to life that no gateway has opened; it ends with `release`, or with this
        connection."""
        self._link.send({"type": "open", "request": request})

    def release(self, request: str) -> None:
        """Ends a request that was opened here; its blocks are freed once nobody holds them."""
        self._link.send({"type": "release", "request": request})

    @property
    def may_assign(self) -> bool:
        """Whether blocks that were refused may be there by now, so that it is worth asking."""
        return not self._refused or time.monotonic() - self._refused_at > _ASK_AGAIN_S

    def assign(
        self, request: str, attempt: int, count: int, keys: Sequence[str] = ()
    ) -> Blocks | None:
        """Asks for a request's blocks, to be held by this worker; see `BlockLedger.assign`.

        Returns:
            None where it cannot have them at the moment: there are not enough, or the service has
            not heard yet that the request was opened, or that its former worker is dead. Ask
            again as soon as `may_assign`; `on_event` is called then.

        Raises:
            RequestError: The device has not, and will not have, memory for that many.
        """
        # First: the news that make it worth asking may come right behind the answer.
        self._refused, self._refused_at = True, time.monotonic()
        body = {"type": "assign", "request": request, "attempt": attempt, "count": count}
        answer = self._link.ask({**body, "keys": list(keys)})
        if answer["blocks"] is None:
            if "error" in answer:
                raise ColdframeError.from_wire(answer["error"])
            return None
        self._refused = False
        return Blocks(answer["blocks"], answer["reused"])

    def publish(self, request: str, keys: Sequence[str]) -> None:
        """Says that a request's KV is written, for others to read; see `BlockLedger.publish`."""
        self._link.send({"type": "publish", "request": request, "keys": list(keys)})

    def claim(self, request: str, attempt: int) -> list[int] | None:
        """Takes over a request's blocks from whoever held them; see `BlockLedger.claim`."""
        answer = self._link.ask({"type": "claim", "request": request, "attempt": attempt})
        blocks: list[int] | None = answer["blocks"]
        return blocks

    def bring(
        self,
        request: str,
        attempt: int,
        count: int,
        written: int,
        keys: Sequence[str] = (),
        ticket: dict[str, Any] | None = None,
    ) -> Blocks | None:
        """Has the KV of a request brought here from where another device's workers wrote it.

        Args:
            request: Whose. Its blocks over there are let go.
            attempt: This worker's.
            count: How many blocks it is to have here.
            written: How many of them, from the first, hold KV; see `BlockLedger.claim`.
            keys: Of its first blocks: those that are published here need not be brought.
            ticket: For the KV where it is in another replica. Then this does not wait for it: ask
                again when it is no more on its way (`is_on_its_way`); `on_event` is called then.

        Returns:
            Its blocks here, or None where it cannot have them at the moment (see `assign`), its
            KV is on its way, or it is lost (`lost_why`).
        """
        self._refused, self._refused_at = True, time.monotonic()
        body = {"type": "bring", "request": request, "attempt": attempt, "count": count}
        body |= {"written": written, "keys": list(keys)}
        if ticket is not None:
            body["ticket"] = ticket
            self._bringing.add(request)  # first: that it is here may come right behind the answer
        answer = self._link.ask(body)
        pending = answer.get("pending", False)
        if not pending:
            self._bringing.discard(request)
        self._refused = answer["blocks"] is None and not answer["lost"] and not pending
        error = answer.get("error")
        self.lost_why = None if error is None else ColdframeError.from_wire(error)
        return None if answer["blocks"] is None else Blocks(answer["blocks"], answer["reused"])

    def is_on_its_way(self, request: str) -> bool:
        """Whether the KV of a request is being brought from another replica."""
        return request in self._bringing

    def drop(self, request: str) -> None:
        """Lets a request's blocks go: this worker touches them no more.

        Returns once the ledger knows, so that who is told of the request next can claim them.
        """
        self._link.ask({"type": "drop", "request": request})

    def finish(self, request: str) -> None:
        """Lets a request's blocks go where nobody is to claim them; see `BlockLedger.finish`."""
        self._link.send({"type": "finish", "request": request})

    def renew(self, request: str) -> None:
        """Keeps the blocks of a request that was dropped and not claimed yet."""
        self._link.send({"type": "renew", "request": request})

    # -- the reading thread ----------------------------------------------------------------------

    def _take(self, message: Message) -> None:
        body = message.body
        match message.kind:
            case "stage":
                self._arrived.add(body["stage"])
                if self._weights.mode != "mapped":
                    self._enter_stage(body["stage"])
            case "plan":
                self._board = BoardView(message.fds[0])
                self._weights.planned(message)
            case "segments" | "remap" | "attach":
                self._map(message)
            case "detach":
                self._weights.is_unwanted = True
            case "relaid":
                self._weights.lay_out(message)
            case "kv":
                mapping = self._reserve(body["size"], KV_BASE)
                kv = KvArena(mapping, body["block_bytes"], body["blocks"])
                try:
                    kv.attach(message.fds, body["segments"])
                except BaseException:
                    mapping.close()
                    raise
                self.kv = kv
            case "kv_grown":
                assert self.kv is not None
                self.kv.attach(message.fds, [body["segment"]])
            case "kv_shrunk":
                assert self.kv is not None
                self.kv.detach()
            case "failed":
                self._link.error = ColdframeError.from_wire(body["error"])
            case "available":
                self._refused = False
            case "fetched":
                self._bringing.discard(body["request"])

    def _map(self, message: Message) -> None:
        ranges = self._weights.map(message)
        if ranges is None:
            return
        if self._weights.mode == "mapped":
            # What is in the page cache is there before the service has looked at all of it. Files
            # as a whole: two milliseconds for half a gigabyte, less than to go by stages.
            assert self.plan is not None
            self._populator.enter([stage.index for stage in self.plan.stages], ranges)
        if message.kind == "remap":
            self._link.send({"type": "remapped"})

    def _enter_stage(self, stage: int) -> None:
        ranges: list[tuple[int, int]] = []
        if self.plan is not None and self._weights.is_mapped:
            ranges = ranges_of(self.plan.stages[stage])
        self._populator.enter([stage], ranges)

    def _entered(self, stages: Sequence[int]) -> None:
        with self._link.changed:
            self._populated.update(stages)
            self._link.changed.notify_all()
        self._on_event()

    def _map_weights(self, size: int, at_base: bool) -> Mapping:
        return self._reserve(size, WEIGHTS_BASE) if at_base else self.device.mapping(size)

    def _reserve(self, size: int, base: int) -> Mapping:
        held = self._reserved.pop(base, None)
        if held is None:
            return self.device.mapping(size, base)
        if held.size >= size:
            return held  # what was made for these addresses, as graphs are, stays true
        held.close()
        return self.device.mapping(size, base, exact=True)
