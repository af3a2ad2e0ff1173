"""What a KV connector has done, counted, with spans for a timeline."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from coldframe.loader.timeline import Recorder, Span

__all__ = ["KvTally", "Loaded"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """KV that was copied.

    Args:
        request: The ledger's name of it.
        tokens: How many.
        nbytes: Bytes of their keys and values, of this rank.
        start_ns, end_ns: CLOCK_MONOTONIC.
    """

    request: str
    tokens: int
    nbytes: int
    start_ns: int
    end_ns: int


@dataclass(slots=True)
class KvTally:
    """Counters of one side of one connector; for several threads.

    Attributes:
        counts: By name: `claimed`, `loaded`, `loaded_tokens`, `loaded_bytes`, `load_ns`,
            `recomputed`, `failed`, `mismatched`, `cancelled`, `saved_tokens`, `saved_bytes`,
            `save_ns`, `handed`, `not_handed`.
        why: Why KV was not used, or not handed on, and how often.
    """

    counts: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    recorder: Recorder = field(default_factory=lambda: Recorder("vllm"))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, count: int = 1, *, why: str | None = None) -> None:
        """Counts something, and where there is one its reason."""
        with self._lock:
            self.counts[name] += count
            if why is not None:
                self.why[why] += 1

    def loaded(self, what: Loaded) -> None:
        """KV has come in."""
        self._copied("load", "loaded", what)

    def saved(self, what: Loaded) -> None:
        """KV has gone out."""
        self._copied("save", "saved", what)

    def _copied(self, verb: str, done: str, what: Loaded) -> None:
        with self._lock:
            self.counts[done] += 1
            self.counts[f"{done}_tokens"] += what.tokens
            self.counts[f"{done}_bytes"] += what.nbytes
            self.counts[f"{verb}_ns"] += what.end_ns - what.start_ns
        note = f"{what.request}: {what.tokens} tokens, {what.nbytes:,} bytes"
        self.recorder.add(f"kv_{verb}", what.start_ns, what.end_ns, note=note)

    def drain(self) -> list[Span]:
        """The spans since the last call."""
        return self.recorder.drain()
