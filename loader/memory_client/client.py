"""A worker's side of the memory service: the arenas mapped, the stages awaited, KV blocks got."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE, Segment
from coldframe.loader.awake import AwakeClock
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices import Device, open_device
from coldframe.loader.devices.base import Mapping
from coldframe.loader.errors import (
    ColdframeError,
    MemoryServiceGone,
    ReplicaError,
    SourceUnreachable,
)
from coldframe.loader.kv.ledger import Blocks
from coldframe.loader.memory_service.board import BoardView, Progress
from coldframe.loader.timeline import now
from coldframe.loader.wire import Channel, Message

__all__ = ["KvArena", "MemoryClient", "STALL_S"]

_Work = tuple[list[int], list[tuple[int, int]]]
"""Stages, and the stretches of the arena that are to be entered for them."""

_ANSWERS = ("assigned", "claimed", "dropped", "brought")
_ASK_AGAIN_S = 0.9

STALL_S = 60.0
"""How long a wait for weights goes on without a single byte coming in, in seconds."""


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
        self._reserved = {reservation.address: reservation for reservation in reserved}
        self._channel = channel
        self._on_event = on_event
        self._stall_s = stall_s
        self._changed = threading.Condition()
        self._asking = threading.Lock()
        self._answers: list[Message] = []
        self._segments: list[Segment] = []
        self._arrived: set[int] = set()
        self._populated: set[int] = set()
        self._error: ColdframeError | None = None
        self._refused = False
        self._refused_at = 0.0
        self._mapped = False
        self._away = False
        """Whether the weights were away when this came, so that there is nothing to map yet."""
        self._unwanted = False
        self._attached: tuple[int, int] | None = None
        self.lost_why: ColdframeError | None = None
        """Why KV was lost that was to be brought from another replica last."""
        self._bringing: set[str] = set()
        """Requests whose KV is on its way from another replica."""
        self._seen = -1
        self._clock = AwakeClock()
        self._seen_at = self._clock()
        self.plan: Plan | None = None
        self.weights: Mapping | None = None
        self.kv: KvArena | None = None
        self._relaid: tuple[Plan, Mapping] | None = None
        self._old: Mapping | None = None
        self._board: BoardView | None = None
        self._mode = ""
        self._to_populate: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._populating = threading.Thread(target=self._populate, name="populate", daemon=True)
        self._populating.start()
        self._reader = threading.Thread(target=self._read, name="memory-client", daemon=True)
        self._reader.start()
        self._channel.send({"type": "hello", "name": name})

    def hang_up(self) -> None:
        """Ends the connection; whoever waits for something gets an error. Any thread may do it."""
        self._channel.hang_up()

    def close(self) -> None:
        """Ends the connection and unmaps the arenas, which nobody may touch any more.

        A worker need not: its end does it. Not to be called from `on_event`.
        """
        self._end()
        for weights in (self.weights, self._old, self._relaid and self._relaid[1]):
            if weights is not None:
                weights.close()
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
        self._channel.hang_up()
        self._reader.join()
        self._to_populate.put(None)
        self._populating.join()
        self._channel.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    # -- what has come ---------------------------------------------------------------------------

    @property
    def error(self) -> ColdframeError | None:
        """Why nothing more will come, where that is so."""
        return self._error

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
        if self._error is not None:
            raise self._error
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
        self._wait(lambda: (self._mapped or self._away) and self.kv is not None, "the load plan")
        assert self.plan is not None
        assert self.weights is not None
        assert self.kv is not None
        return self.plan, self.weights, self.kv

    def wait_weights(self) -> tuple[Plan, Mapping]:
        """Waits until the weights' arena is mapped here; see `wait_arenas`."""
        self._wait(lambda: self._mapped or self._away, "the load plan")
        assert self.plan is not None
        assert self.weights is not None
        return self.plan, self.weights

    def wait_stage(self, stage: int) -> None:
        """Waits until a stage's weights are in."""
        self._wait(lambda: self.is_ready(stage), f"stage {stage}")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        self._seen_at = self._clock()
        with self._changed:
            while not done():
                if self._error is not None:
                    raise self._error
                self.check_stalled(what)
                self._changed.wait(min(self._stall_s / 4, 1.0))

    def check_stalled(self, what: str | None = None) -> None:
        """For whoever waits for weights by its own means: call it now and then.

        Args:
            what: What is waited for, for the message.

        Raises:
            SourceUnreachable: Nothing has come in for too long.
        """
        done, total = self.progress
        if done != self._seen:
            self._seen, self._seen_at = done, self._clock()
        elif self._clock() - self._seen_at > self._stall_s:
            raise SourceUnreachable(
                f"no byte of the weights came in for {self._stall_s:g} s",
                where=what,
                got=f"{done:,} of {total:,} bytes",
                hint="Check the disk or the network that the weights come from.",
            )

    # -- KV --------------------------------------------------------------------------------------

    def open(self, request: str) -> None:
        """Brings a request to life that no gateway has opened; it ends with `release`, or with this
        connection."""
        self._channel.send({"type": "open", "request": request})

    def release(self, request: str) -> None:
        """Ends a request that was opened here; its blocks are freed once nobody holds them."""
        self._channel.send({"type": "release", "request": request})

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
        answer = self._ask({**body, "keys": list(keys)})
        if answer["blocks"] is None:
            if "error" in answer:
                raise ColdframeError.from_wire(answer["error"])
            return None
        self._refused = False
        return Blocks(answer["blocks"], answer["reused"])

    def publish(self, request: str, keys: Sequence[str]) -> None:
        """Says that a request's KV is written, for others to read; see `BlockLedger.publish`."""
        self._channel.send({"type": "publish", "request": request, "keys": list(keys)})

    def claim(self, request: str, attempt: int) -> list[int] | None:
        """Takes over a request's blocks from whoever held them; see `BlockLedger.claim`."""
        answer = self._ask({"type": "claim", "request": request, "attempt": attempt})
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
        answer = self._ask(body)
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
        self._ask({"type": "drop", "request": request})

    def finish(self, request: str) -> None:
        """Lets a request's blocks go where nobody is to claim them; see `BlockLedger.finish`."""
        self._channel.send({"type": "finish", "request": request})

    def renew(self, request: str) -> None:
        """Keeps the blocks of a request that was dropped and not claimed yet."""
        self._channel.send({"type": "renew", "request": request})

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._asking:
            self._channel.send(body)
            deadline = self._clock() + self._stall_s
            with self._changed:
                while self._error is not None or not self._answers:
                    if self._error is not None:
                        raise self._error
                    if self._clock() >= deadline:
                        # For good: a late answer would be taken for that of the next question.
                        self._error = ReplicaError(
                            "the memory service does not answer", where=str(body["type"])
                        )
                        raise self._error
                    self._changed.wait(1.0)
                return self._answers.pop(0).body

    # -- the reading thread ----------------------------------------------------------------------

    def _read(self) -> None:
        lost = MemoryServiceGone("the memory service is gone")
        reason: ColdframeError = lost
        try:
            while (message := self._channel.recv()) is not None:
                with self._changed:
                    self._take(message)
                    self._changed.notify_all()
                if message.kind not in _ANSWERS:  # whoever asked waits for it already
                    self._on_event()
        except ColdframeError as error:
            reason = error
        except Exception as error:  # noqa: BLE001 - a thread must report whatever ends it
            reason = ReplicaError("the memory service cannot be understood", got=repr(error))
        with self._changed:
            # The first cause is the one that tells.
            self._error = self._error or reason
            self._changed.notify_all()
        self._on_event()

    def _populate(self) -> None:
        """A thread that spares whoever computes with a stage the page faults.

        A stage is ready when it is in and entered here: who touches pages while they are entered
        is in the way, and takes longer for both.
        """
        while (work := self._to_populate.get()) is not None:
            stages, ranges = work
            weights = self.weights
            if weights is not None:
                for offset, length in ranges:
                    weights.populate(offset, length)
            with self._changed:
                self._populated.update(stages)
                self._changed.notify_all()
            self._on_event()

    def _populate_stage(self, stage: int) -> None:
        ranges: list[tuple[int, int]] = []
        if self.plan is not None and self._mapped:
            for extent in self.plan.stages[stage].extents:
                for run in extent.runs:
                    ranges.append((run.arena_offset, run.length * run.count))
        self._to_populate.put(([stage], ranges))

    def _take(self, message: Message) -> None:
        body = message.body
        match message.kind:
            case "stage":
                self._arrived.add(body["stage"])
                if self._mode != "mapped":
                    self._populate_stage(body["stage"])
            case "plan":
                self.plan = Plan.from_wire(body["plan"])
                self._board = BoardView(message.fds[0])
                self._mode = body["mode"]
                self._away = body["away"]
                self.weights = self._reserve(self.plan.arena_bytes, WEIGHTS_BASE)
            case "segments" | "remap" | "attach":
                self._map(message)
            case "detach":
                self._unwanted = True
            case "relaid":
                self._lay_out(message)
            case "kv":
                mapping = self._reserve(body["size"], KV_BASE)
                try:
                    grown = self._attach(mapping, message.fds, body["segments"])
                except BaseException:
                    mapping.close()
                    raise
                kv = KvArena(mapping, body["block_bytes"], body["blocks"])
                kv.grown, self.kv = grown, kv
            case "kv_grown":
                assert self.kv is not None
                segments = [body["segment"]]
                self.kv.grown = self._attach(self.kv.reservation, message.fds, segments)
            case "kv_shrunk":
                assert self.kv is not None
                self.kv.grown = 0
                self.kv.reservation.detach()
            case "failed":
                self._error = ColdframeError.from_wire(body["error"])
            case kind if kind in _ANSWERS:
                self._answers.append(message)
            case "available":
                self._refused = False
            case "fetched":
                self._bringing.discard(body["request"])

    def _reserve(self, size: int, base: int) -> Mapping:
        held = self._reserved.pop(base, None)
        if held is None:
            return self.device.mapping(size, base)
        if held.size >= size:
            return held  # what was made for these addresses, as graphs are, stays true
        held.close()
        return self.device.mapping(size, base, exact=True)

    @staticmethod
    def _attach(mapping: Mapping, fds: Sequence[int], segments: Sequence[list[Any]]) -> int:
        """Maps segments; returns where the last of them ends."""
        found = [Segment.from_wire(fd, data) for fd, data in zip(fds, segments, strict=True)]
        try:
            mapping.attach(found)
        finally:
            for fd in fds:
                os.close(fd)
        return max((segment.offset + segment.length for segment in found), default=0)

    def _collect(self, message: Message) -> bool:
        """Takes segments; whether these were the last of them."""
        self._segments += [
            Segment.from_wire(fd, data)
            for fd, data in zip(message.fds, message.body["segments"], strict=True)
        ]
        return bool(message.body["last"])

    def _attach_collected(self, mapping: Mapping) -> list[tuple[int, int]]:
        """Maps the segments that have come; returns the offset and length of each."""
        segments, self._segments = self._segments, []
        try:
            mapping.attach(segments)
        finally:
            for segment in segments:
                os.close(segment.fd)
        return [(segment.offset, segment.length) for segment in segments]

    def _lay_out(self, message: Message) -> None:
        if not self._collect(message):
            return
        plan = Plan.from_wire(message.body["plan"])
        weights = self.device.mapping(plan.arena_bytes)
        try:
            self._attach_collected(weights)
        except BaseException:
            weights.close()
            raise
        weights.populate(0, plan.arena_bytes)
        self._relaid = (plan, weights)

    def take_relaid(self) -> tuple[Plan, Mapping] | None:
        """The weights at other addresses, where the service has laid them out anew.

        Call `let_go_of_old` once nothing of this process looks at the old ones any more.
        """
        relaid, self._relaid = self._relaid, None
        if relaid is not None:
            self._old = self.weights
            self.plan, self.weights = relaid
        return relaid

    @property
    def is_to_let_go(self) -> bool:
        """Whether the service wants the device's memory of the weights for others."""
        return self._unwanted

    @property
    def away(self) -> bool:
        """Whether there is nothing behind the weights' addresses."""
        return not self._mapped

    @property
    def holds_nothing(self) -> bool:
        """Whether nothing of a device's memory that others have is mapped here, or about to be.

        That is so from when the weights have left and the KV's memory was given back. Messages
        keep their order, so that it stays so until the service has been told otherwise.
        """
        arenas = (self.weights, self.kv and self.kv.reservation)
        return not self._segments and not any(arena and arena.attached for arena in arenas)

    def let_go(self) -> None:
        """Unmaps the weights; no stage is ready from then on. They come back to the same place.

        Nothing of this process may look at them, nor on the device.
        """
        assert self.weights is not None
        with self._changed:
            self._arrived.clear()
            self._populated.clear()
            self._unwanted = self._mapped = False
        self.weights.detach()
        self._channel.send({"type": "detached"})

    def take_attached(self) -> tuple[int, int] | None:
        """From when to when weights that had left were mapped again, once (CLOCK_MONOTONIC)."""
        attached, self._attached = self._attached, None
        return attached

    def let_go_of_old(self) -> None:
        """Unmaps the weights at their old addresses."""
        if self._old is not None:
            self._old.close()
            self._old = None
            self._channel.send({"type": "remapped"})

    def _map(self, message: Message) -> None:
        if not self._collect(message):
            return
        assert self.weights is not None
        started = now()
        # Mapping over a mapping is one step for every other thread: a forward pass that runs
        # meanwhile reads the same bytes from either.
        ranges = self._attach_collected(self.weights)
        self._mapped = True
        if self._mode == "mapped":
            # What is in the page cache is there before the service has looked at all of it. Files
            # as a whole: two milliseconds for half a gigabyte, less than to go by stages.
            assert self.plan is not None
            stages = [stage.index for stage in self.plan.stages]
            self._to_populate.put((stages, ranges))
        if message.kind == "remap":
            self._channel.send({"type": "remapped"})
        elif message.kind == "attach":
            self._attached = (started, now())
