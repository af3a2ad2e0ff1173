"""Weights and KV taken from the memory of another device, of this machine.

Where the workers of a replica compute on several devices, each device has a memory service. The
first one loads; the others attach to it as its workers do, map its arenas on their own devices, and
copy: the weights stage by stage as they come in there, the KV of a request when a worker here goes
on with it. From GPU to GPU that is a copy by the device itself, which no host memory sees.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from coldframe.loader.devices.base import Arena, Device
from coldframe.loader.devices.parked import stretches_of as stretches_of_stages
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.kv.runs import runs_of, stretches_of
from coldframe.loader.loads.base import LoadEvents
from coldframe.loader.loads.weights import Weights
from coldframe.loader.memory_client.client import STALL_S, MemoryClient
from coldframe.loader.memory_service.board import Board, StageState
from coldframe.loader.timeline import Recorder, now
from coldframe.loader.wire import Channel

__all__ = ["LoadBeside"]

_TRY_AGAIN_S = 0.005


class LoadBeside:
    """A load whose bytes come from another device; see `AnyLoad`.

    Whether they are the right ones, and where they are kept, is the affair of the first device.

    Args:
        path: The socket of the memory service of that device.
        device: Whose memory they go to.
        recorder: Where its spans go.
        events: Told how it goes.
    """

    weights: Weights
    board: Board
    local = True
    identity: str | None = None
    proven = False
    peers_at: str | None = None

    def __init__(self, path: str, device: Device, recorder: Recorder, events: LoadEvents) -> None:
        self._path = path
        self._device = device
        self._recorder = recorder
        self._events = events
        self._news = threading.Event()
        self._orders: SimpleQueue[Callable[[MemoryClient], None] | None] = SimpleQueue()
        self._client: MemoryClient | None = None
        self._following: threading.Thread | None = None
        self._bringing: threading.Thread | None = None
        self._opened = False
        """Whether there are `weights`."""
        self._closing = False

    def run(self) -> None:
        """Attaches, and has a thread copy.

        Raises:
            ColdframeError: The other service is not there, or has nothing to give.
            DeviceError: The devices cannot reach each other's memory, or this one is full.
        """
        channel = self._connect()
        self._client = client = MemoryClient(
            channel, "beside", on_event=self._news.set, device=self._device
        )
        plan, _ = client.wait_weights()
        self.weights = weights = Weights(plan, self._device)
        self._opened = True
        weights.verified = "by the first device's memory service"
        self.board = Board([stage.nbytes for stage in plan.stages])
        arena = self._device.arena("weights", plan.arena_bytes, now=True)
        weights.lie_in(arena)
        self._events.on_plan()

        def follow() -> None:
            error: ColdframeError | None = None
            started = now()
            try:
                self._copy_stages(client, arena)
            except ColdframeError as failure:
                error = failure
            except Exception as failure:  # noqa: BLE001 - a thread must report whatever ends it
                error = ReplicaError("the copy from the first device broke", got=repr(failure))
            if self._closing:
                return
            self._recorder.add("weight_read", started, note="from the first device")
            if error is not None:
                self._fail_stages()
            self._events.on_end(error)
            if error is None:
                self._keep_to(client)

        self._following = threading.Thread(target=follow, name="beside", daemon=True)
        self._following.start()
        self._bringing = threading.Thread(
            target=self._bring, args=(client,), name="beside-kv", daemon=True
        )
        self._bringing.start()

    def _connect(self) -> Channel:
        deadline = time.monotonic() + STALL_S
        while True:
            try:
                return Channel.connect(self._path)
            except ReplicaError:  # it starts at the same moment
                if self._closing or time.monotonic() > deadline:
                    raise
                time.sleep(_TRY_AGAIN_S)

    def _copy_stages(self, client: MemoryClient, arena: Arena) -> None:
        """Each stage, as soon as it is in over there."""
        theirs, plan = client.weights, self.weights.plan
        assert theirs is not None
        for stage, stretches in zip(plan.stages, stretches_of_stages(plan), strict=True):
            client.wait_stage(stage.index)
            if self._closing:
                raise ReplicaError("the load is being closed")
            arena.take(theirs, [(offset, offset, length) for offset, length in stretches])
            self.board.advance(stage.index, stage.nbytes)
            self.board.settle(stage.index, StageState.READY)
            self._recorder.add(f"stage_ready[{stage.index}]", now())
            self._events.on_stage(stage.index)

    def _fail_stages(self) -> None:
        for stage in self.weights.plan.stages:
            if self.board.state(stage.index) is StageState.PENDING:
                self.board.settle(stage.index, StageState.FAILED)

    def _keep_to(self, client: MemoryClient) -> None:
        """Lets go of the other device's weights when their memory is wanted for others."""
        while not self._closing:
            self._news.wait()
            self._news.clear()
            if client.error is not None:
                if not self._closing:
                    self._events.on_end(client.error)
                return
            if client.is_to_let_go:
                client.let_go()

    # -- KV --------------------------------------------------------------------------------------

    def bring(
        self,
        request: str,
        attempt: int,
        blocks: Sequence[int],
        reused: int,
        arena: Arena,
        done: Callable[[bool], None],
    ) -> None:
        """Copies the KV of a request into blocks here, and lets go of it over there.

        Args:
            request: Whose.
            attempt: Of whoever goes on with it.
            blocks: Of the arena here, in order, as many as hold KV over there.
            reused: How many of them, from the first, hold it already.
            arena: Where they are.
            done: Told by another thread whether it is there; nothing is written here any more then.
        """

        def order(client: MemoryClient) -> None:
            there = client.claim(request, attempt)
            if there is None:
                done(False)
                return
            copied = False
            try:
                kv = client.kv
                assert kv is not None
                runs = runs_of(blocks, reused, len(blocks))
                arena.take(kv.reservation, stretches_of(runs, there, kv.block_bytes))
                copied = True
            finally:
                client.finish(request)
                done(copied)

        self._orders.put(order)

    def _bring(self, client: MemoryClient) -> None:
        while (order := self._orders.get()) is not None:
            try:
                order(client)
            except ColdframeError as failure:
                error = failure
            except Exception as failure:  # noqa: BLE001 - a thread must report whatever ends it
                error = ReplicaError("bringing KV from the first device broke", got=repr(failure))
            else:
                continue
            if not self._closing:
                self._events.on_end(error)
            return

    # -- the end ---------------------------------------------------------------------------------

    def landed(self) -> None:
        """Nothing is kept for the copy alone."""

    def close(self) -> None:
        self._closing = True
        if self._client is not None:
            self._orders.put(None)
            self._client.hang_up()
            self._news.set()
            for thread in (self._following, self._bringing):
                if thread is not None:
                    thread.join()
            self._client.close()
        if self._opened:
            self.weights.close()
