"""The timeline of one start, written while it goes on, and told from then on."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import Any

from coldframe.loader.timeline import Recorder, Span, now
from coldframe.runtime.replica.replica import Replica
from coldframe.runtime.timeline.timeline import Timeline

__all__ = ["StartLog"]

_SPANS_NS = 2_000_000_000
"""How long after the first token spans of the start may still come."""
_MOST_LATEST = 256
"""So many spans of requests behind the start are kept."""
_FAILED = "vllm_failed"
_BRIDGE = ("takeover", _FAILED)
"""The front's spans of a vLLM engine."""
_MOST_TRIES = 3
"""Of so many starts of an engine that failed the spans are kept, the latest ones: it is tried for
as long as the replica lives."""


class StartLog:
    """What happened from a start's beginning to its first token.

    Args:
        began_ns: When it was asked for: the exec, or the request that woke the replica.
        recorder: Has the front's spans.
    """

    def __init__(self, began_ns: int, recorder: Recorder) -> None:
        self.began_ns = began_ns
        self.first_token_ns: int | None = None
        self.open = True
        """Whether there is more to come."""
        self._recorder = recorder
        self._spans: list[Span] = []
        self._facts: dict[str, Any] = {}
        self._told: dict[str, Any] | None = None
        self._late = False
        """Whether only a vLLM engine is still on its way."""
        self._tries: deque[list[Span]] = deque(maxlen=_MOST_TRIES)
        """What has come since then of engines that did not come up, and..."""
        self._try: list[Span] = []
        """... of the one that may."""
        self._latest: deque[Span] = deque(maxlen=_MOST_LATEST)
        """Of requests behind the start."""
        self.decode: dict[str, str | None] | None = None
        """Who decodes, why not vLLM where it should, how that has come up, and why as no clone;
        None where no vLLM is wanted."""

    @property
    def first_token_s(self) -> float:
        """How long the first token has been waited for, or was, in seconds."""
        return ((self.first_token_ns or now()) - self.began_ns) / 1e9

    def step(self, replica: Replica) -> bool:
        """Takes note of what there is; to be called after each poll.

        Returns:
            Whether decode has changed hands between native workers and vLLM.
        """
        if self.first_token_ns is None and replica.answered:
            self.first_token_ns = now()
        if self.open:
            self._take(replica)
            late = self.first_token_ns is not None and now() - self.first_token_ns > _SPANS_NS
            self._late = late and replica.loaded
            # An engine that has failed to come up is tried again, and its start told, too.
            if self._late and not replica.awaits_engine:
                self.close()
        else:
            # Every request to come has spans, too: the latest ones are enough.
            self._latest += [*self._recorder.drain(), *replica.spans]
            replica.spans.clear()
        before, self.decode = self.decode, _decode(replica)
        engines = [None if told is None else told["engine"] for told in (before, self.decode)]
        return before is not None and engines[0] != engines[1]

    def close(self) -> None:
        """Takes no more: the start is over."""
        if self.open:
            self.document()
            self.open = False

    def timeline(self) -> Timeline:
        spans = [*self._spans, *chain.from_iterable(self._tries), *self._try]
        return Timeline(spans, self.began_ns, self.first_token_ns)

    def document(self) -> dict[str, Any]:
        """The timeline and what else is known of the start, as JSON values."""
        if self._told is None or self.open:
            facts = self._facts
            self._told = {
                "timeline": self.timeline().to_json(),
                "began_ns": self.began_ns,
                "device": facts.get("device"),
                "device_why": facts.get("device_why"),
                "snapshot": facts.get("snapshot"),
                "load_mode": facts.get("mode"),
                "load_mode_reason": facts.get("why"),
                "verified": facts.get("verified"),
            }
        # These go on after the start.
        stages = Timeline(self._latest, self.began_ns, None).to_json()["stages"]
        latest = {"began_ns": self.began_ns, "stages": stages}
        return {**self._told, "decode": self.decode, "latest": latest}

    def _take(self, replica: Replica) -> None:
        self._facts = replica.facts
        spans = [*self._recorder.drain(), *replica.spans]
        if self.first_token_ns is not None:
            self._latest += spans
        replica.spans.clear()
        if not self._late:
            self._spans += spans
            return
        # An engine's first start may take minutes, and each request meanwhile has spans, too.
        for span in filter(_of_vllm, spans):
            self._try.append(span)
            if span.name == _FAILED:
                self._tries.append(self._try)
                self._try = []


def _of_vllm(span: Span) -> bool:
    """Whether a span is one of a vLLM engine's start, or of the front for it."""
    if span.process.startswith("vllm"):
        return not span.name.startswith("kv_load")
    if span.process == "snapshot":
        return True  # by now nobody else is restored
    started = span.name in ("process_spawn", "snapshot_restore")
    return (started and (span.note or "").startswith("vllm")) or span.name in _BRIDGE


def _decode(replica: Replica) -> dict[str, str | None] | None:
    if replica.options.vllm is None:
        return None
    bridge = replica.bridge
    by_vllm = replica.options.vllm.alone or bridge.decodes
    engine = replica.facts.get("snapshot", {}).get("engine", {})
    return {
        "engine": "vllm" if by_vllm else "native",
        "why": bridge.why,
        "tier": engine.get("tier"),
        "no_clone": engine.get("why"),
    }
