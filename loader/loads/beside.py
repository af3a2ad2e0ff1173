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

from coldframe.loader.devices.base import Arena, Stretches
from coldframe.loader.devices.parked import stretches_of
from coldframe.loader.errors import ColdframeError, ReplicaError
from coldframe.loader.loads.load import Load
from coldframe.loader.memory_client.client import STALL_S, MemoryClient
from coldframe.loader.memory_service.board import Board, StageState
from coldframe.loader.timeline import now
from coldframe.loader.wire import Channel

__all__ = ["LoadBeside"]

_TRY_AGAIN_S = 0.005


class LoadBeside(Load):
    """A load whose bytes come from another device; see `Load` for what it is given and tells.

    `LoadOptions.beside` is the socket of the memory service of that device.
    """

    local = True
    identity = None
    proven = False
    must_verify = False
    may_realign = False
    writer_waits = False

    _client: MemoryClient | None = None
    _following: threading.Thread | None = None
    _bringing: threading.Thread | None = None
    _orders: SimpleQueue[Callable[[MemoryClient], None] | None]

    def run(self) -> None:
        """Attaches, and has a thread copy.

        Raises:
            ColdframeError: The other service is not there, or has nothing to give.
            DeviceError: The devices cannot reach each other's memory, or this one is full.
        """
        self.mode, self.verified = "copied", "by the first device's memory service"
        self._news = threading.Event()
        self._orders = SimpleQueue()
        channel = self._connect()
        self._client = client = MemoryClient(
            channel, "beside", on_event=self._news.set, device=self._device
        )
        plan, _ = client.wait_weights()
        self.plan = plan
        self.board = Board([stage.nbytes for stage in plan.stages])
        self._arena = arena = self._device.arena("weights", plan.arena_bytes, now=True)
        self.segments = arena.segments
        self._on_plan()

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
            self._on_end(error)
            if error is None:
                self._keep_to(client)

        self._following = threading.Thread(target=follow, name="beside", daemon=True)
        self._following.start()
        self._bringing = threading.Thread(
            target=self._bring, args=(client,), name="beside-kv", daemon=True
        )
        self._bringing.start()

    def _connect(self) -> Channel:
        path = self._options.beside
        assert path is not None
        deadline = time.monotonic() + STALL_S
        while True:
            try:
                return Channel.connect(path)
            except ReplicaError:  # it starts at the same moment
                if self._closing or time.monotonic() > deadline:
                    raise
                time.sleep(_TRY_AGAIN_S)

    def _copy_stages(self, client: MemoryClient, arena: Arena) -> None:
        """Each stage, as soon as it is in over there."""
        weights = client.weights
        assert weights is not None
        for stage, stretches in zip(self.plan.stages, stretches_of(self.plan), strict=True):
            client.wait_stage(stage.index)
            self._check_open()
            arena.take(weights, [(offset, offset, length) for offset, length in stretches])
            self.board.advance(stage.index, stage.nbytes)
            self.board.settle(stage.index, StageState.READY)
            self._recorder.add(f"stage_ready[{stage.index}]", now())
            self._on_stage(stage.index)

    def _fail_stages(self) -> None:
        for stage in self.plan.stages:
            if self.board.state(stage.index) is StageState.PENDING:
                self.board.settle(stage.index, StageState.FAILED)

    def _keep_to(self, client: MemoryClient) -> None:
        """Lets go of the other device's weights when their memory is wanted for others."""
        while not self._closing:
            self._news.wait()
            self._news.clear()
            if client.error is not None:
                if not self._closing:
                    self._on_end(client.error)
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
                arena.take(kv.reservation, _runs(blocks, there, reused, kv.block_bytes))
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
                self._on_end(error)
            return

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
        super().close()


def _runs(here: Sequence[int], there: Sequence[int], first: int, size: int) -> Stretches:
    """Blocks to be copied: to, from and length in bytes, neighbours as one."""
    runs: list[tuple[int, int, int]] = []
    for mine, theirs in zip(here[first:], there[first : len(here)], strict=True):
        to, source = mine * size, theirs * size
        if runs:
            last_to, last_source, length = runs[-1]
            if (last_to + length, last_source + length) == (to, source):
                runs[-1] = (last_to, last_source, length + size)
                continue
        runs.append((to, source, size))
    return runs
