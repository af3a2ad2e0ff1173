"""Gathers what the front tells the gateway's metrics, from a replica that goes on meanwhile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from coldframe.runtime.frontstats import (
    BusyClock,
    FrontStats,
    critical_seconds,
    resident,
    stage_seconds,
)
from coldframe.runtime.replica import Replica
from coldframe.runtime.timeline import Timeline

__all__ = ["FrontCount"]

_USAGE_S = 1.0
"""How old what the memory service said of its blocks may be: a scrape does not wait for it."""


class FrontCount:
    """Counts beside a replica.

    Args:
        replica: Whose numbers these are.
        clock: Monotonic seconds.
        device: `cpu` or `cuda`.
    """

    def __init__(
        self,
        replica: Replica,
        clock: Callable[[], float] = time.monotonic,
        device: str = "cpu",
    ) -> None:
        self._replica = replica
        self._clock = clock
        self._device = device
        self._busy = BusyClock(clock)
        self._cold_starts: Counter[str] = Counter()
        self._answered = False
        self._asked = -_USAGE_S
        self._told: tuple[Timeline, dict[str, float], dict[str, float]] | None = None

    def step(self) -> None:
        """Takes note of what the replica does now; to be called after each poll."""
        replica = self._replica
        self._busy.watch(held=replica.error is None, requests=0 if replica.idle else 1)
        if replica.answered and not self._answered:
            tier = replica.facts.get("snapshot", {}).get("tier")
            self._cold_starts[tier or "fresh"] += 1
        self._answered = replica.answered
        now = self._clock()
        if now - self._asked >= _USAGE_S and replica.known and replica.error is None:
            self._asked = now
            replica.ask_usage()

    def stats(self, timeline: Timeline | None, processes: Mapping[str, int]) -> FrontStats:
        """The numbers as they are now.

        Args:
            timeline: Of the last cold start, once its first token is out.
            processes: All of the replica by name, with their ids.
        """
        replica = self._replica
        stages, critical = self._of_start(timeline)
        found = {name: resident(pid) for name, pid in processes.items()}
        return FrontStats(
            kv_blocks_used=replica.usage.get("kv_used", 0),
            kv_blocks_cached=replica.usage.get("kv_cached", 0),
            kv_blocks_total=replica.usage.get("kv_total", 0),
            kv_blocks_reused=replica.usage.get("kv_reused", 0),
            weights_bytes=replica.facts.get("weights_bytes", 0),
            bytes_loaded=0 if replica.board is None else replica.board.progress.done,
            load_s=replica.load_s,
            cold_starts=self._cold_starts,
            stages=stages,
            critical=critical,
            zero_s=self._busy.zero_s,
            device=self._device,
            used_s=self._busy.used_s,
            idle_s=self._busy.idle_s,
            memory={name: kinds for name, kinds in found.items() if kinds},
        )

    def _of_start(self, timeline: Timeline | None) -> tuple[dict[str, float], dict[str, float]]:
        if timeline is None or timeline.first_token_ns is None:
            return {}, {}
        told = self._told
        # Its critical path takes milliseconds to find; that of the same spans is the same.
        if told is None or told[0].spans != timeline.spans:
            told = self._told = timeline, stage_seconds(timeline), critical_seconds(timeline)
        return told[1], told[2]
