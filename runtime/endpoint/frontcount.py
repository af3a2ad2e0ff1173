"""Gathers what the front tells the gateway's metrics, from replicas that come and go."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from coldframe.loader.kv.tally import StoreUsage
from coldframe.loader.transport.usage import TakeUsage
from coldframe.runtime.endpoint.frontstats import (
    BusyClock,
    DeviceState,
    FrontStats,
    critical_seconds,
    resident,
    stage_seconds,
)
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.timeline.timeline import Timeline

__all__ = ["FrontCount"]


class FrontCount:
    """Counts beside one replica after the other.

    Args:
        clock: Monotonic seconds.
        devices: What a replica is to be on: `cpu`, or `cuda:N` and so on.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        devices: tuple[str, ...] = ("cpu",),
    ) -> None:
        self._clock = clock
        self._busy = BusyClock(clock, devices)
        self._cold_starts: Counter[str] = Counter()
        self._answered = False
        self._replica: Replica | None = None
        self._loaded_before = 0
        self._load_s_before = 0.0
        self._reused_before = 0
        self._by_decode_before = 0
        self._stored_before: Counter[str] = Counter()
        self._tickets_before: Counter[str] = Counter()
        self._faults_before: Counter[str] = Counter()
        self._vllm_before: Counter[str] = Counter()
        self._told: tuple[Timeline, dict[str, float], dict[str, float]] | None = None

    def step(self, replica: Replica | None, *, idle: bool, parked: bool = False) -> None:
        """Takes note of what is held now; to be called after each poll.

        Args:
            replica: The one that there is.
            idle: Whether no request is open, held ones included.
            parked: Whether it holds no memory of the device but the weights.
        """
        self._replica = replica
        if replica is None or replica.error is not None:
            self._busy.enter("zero")
            return
        state: DeviceState = "used" if not idle else "parked" if parked else "idle"
        self._busy.enter(state, replica.options.devices)
        if replica.answered and not self._answered:
            tier = replica.facts.get("snapshot", {}).get("tier")
            self._cold_starts[tier or "fresh"] += 1
        self._answered = replica.answered

    def leave(self, replica: Replica) -> None:
        """A replica is about to be ended: what it did stays counted."""
        if replica.board is not None:
            self._loaded_before += replica.board.progress.done
        self._load_s_before += replica.load_s
        self._reused_before += replica.usage.get("kv_reused", 0)
        self._by_decode_before += replica.prefilled_by_decode
        self._stored_before = self._stored(replica.usage, now=False)
        self._tickets_before = self._tickets(replica.usage)
        self._faults_before += replica.faults.counts
        self._vllm_before += replica.bridge.counts
        self._replica, self._answered = None, False
        self._busy.enter("zero")

    def stats(self, timeline: Timeline | None, processes: Mapping[str, int]) -> FrontStats:
        """The numbers as they are now.

        Args:
            timeline: Of the last cold start, once its first token is out.
            processes: All that there are by name, with their ids.
        """
        replica = self._replica
        stages, critical = self._of_start(timeline)
        found = {name: resident(pid) for name, pid in processes.items()}
        usage: Mapping[str, int] = {} if replica is None else replica.usage
        facts: Mapping[str, Any] = {} if replica is None else replica.facts
        by_decode = 0 if replica is None else replica.prefilled_by_decode
        board = None if replica is None else replica.board
        away = None if replica is None else replica.contexts.status
        return FrontStats(
            kv_blocks_used=usage.get("kv_used", 0),
            kv_blocks_cached=usage.get("kv_cached", 0),
            kv_blocks_total=usage.get("kv_total", 0),
            kv_blocks_reused=self._reused_before + usage.get("kv_reused", 0),
            prefill_tokens_waiting=0 if replica is None else replica.prefill_tokens,
            prefilled_by_decode=self._by_decode_before + by_decode,
            prefill_batch_tokens=facts.get("prefill_batch", {}).get("tokens", 0),
            kv_store=self._stored(usage),
            kv_tickets=self._tickets(usage),
            weights_bytes=facts.get("weights_bytes", 0),
            bytes_loaded=self._loaded_before + (0 if board is None else board.progress.done),
            load_s=self._load_s_before + (0.0 if replica is None else replica.load_s),
            cold_starts=self._cold_starts,
            stages=stages,
            critical=critical,
            zero_s=self._busy.zero_s,
            parked_s=self._busy.parked_s,
            device_s=self._busy.by_device,
            device_faults=self._faults_before + (replica.faults.counts if replica else Counter()),
            workers={} if replica is None else replica.staff,
            vllm_events=self._vllm_before + (replica.bridge.counts if replica else Counter()),
            contexts_away_bytes=(away or {}).get("bytes", 0),
            memory={name: kinds for name, kinds in found.items() if kinds},
        )

    def _stored(self, usage: Mapping[str, int], *, now: bool = True) -> Counter[str]:
        """What the KV store has counted, of all replicas, and what there is `now`."""
        found = Counter(self._stored_before)
        for name, state in StoreUsage.states().items():
            if now or not state:
                found[name] += usage.get(f"kv_store_{name}", 0)
        return found

    def _tickets(self, usage: Mapping[str, int]) -> Counter[str]:
        """What has become of the tickets for KV that came with requests, of all replicas."""
        found = {name: usage.get(name, 0) for name in TakeUsage.names()}
        return self._tickets_before + Counter(found)

    def _of_start(self, timeline: Timeline | None) -> tuple[dict[str, float], dict[str, float]]:
        if timeline is None or timeline.first_token_ns is None:
            return {}, {}
        told = self._told
        # Its critical path takes milliseconds to find; that of the same spans is the same.
        if told is None or told[0].spans != timeline.spans:
            told = self._told = timeline, stage_seconds(timeline), critical_seconds(timeline)
        return told[1], told[2]
