"""One timeline per replica start: the spans of all processes, and the critical path among them.

The critical path answers what the first token was waiting for at each moment from the exec on. It
follows the prefill worker that made the token. While that worker computes, the moment belongs to
what it computes; while it waits for weights, to what the memory service does then; while it is
restored, to what is done with the image for that; before it was started, to the front. A moment
that belongs to nothing is `unattributed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from coldframe.loader.timeline import Span

__all__ = ["PathStep", "Timeline", "UNATTRIBUTED"]

UNATTRIBUTED = "unattributed"
_FRONT = "front"
_MEMORY = "memory"
_SNAPSHOT = "snapshot"


@dataclass(frozen=True, slots=True)
class PathStep:
    """A stretch of the critical path that belongs to one stage of one process."""

    name: str
    process: str
    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


class Timeline:
    """What happened in a replica's start.

    Args:
        spans: Of all processes, in one clock (CLOCK_MONOTONIC, ns).
        exec_ns: When the front's process was created.
        first_token_ns: When the first token was out, or None if there was none.
    """

    def __init__(self, spans: Iterable[Span], exec_ns: int, first_token_ns: int | None) -> None:
        self.spans = sorted(spans, key=lambda span: (span.start_ns, span.end_ns))
        self.exec_ns = exec_ns
        self.first_token_ns = first_token_ns

    def first(self, name: str, process: str | None = None) -> Span | None:
        """The earliest span of that name."""
        found = (s for s in self.spans if s.name == name and process in (None, s.process))
        return next(found, None)

    def last_stage_ready_ns(self) -> int | None:
        """When the last of the weights was in."""
        ready = [s.end_ns for s in self.spans if s.name.startswith("stage_ready[")]
        if ready:
            return max(ready)
        read = self.first("weight_read", _MEMORY)
        return None if read is None else read.end_ns

    def critical_path(self) -> list[PathStep]:
        """The stretches from the exec to the first token, without gaps; empty if there was none."""
        if self.first_token_ns is None:
            return []
        head = [s for s in self.spans if s.name == "prefill[head]"]
        head = [s for s in head if s.end_ns <= self.first_token_ns] or head
        worker = head[-1].process if head else None
        return _merge(_owners(self.spans, worker, self.exec_ns, self.first_token_ns))

    def unattributed_s(self) -> float:
        """Seconds of the critical path that belong to no stage."""
        return sum(step.seconds for step in self.critical_path() if step.name == UNATTRIBUTED)

    def seconds(self, moment_ns: int) -> float:
        """A moment, in seconds from the exec on."""
        return (moment_ns - self.exec_ns) / 1e9

    def to_json(self) -> dict[str, Any]:
        """The timeline as JSON values; all times are seconds from the exec on."""
        return {
            "ttft_s": None if self.first_token_ns is None else self.seconds(self.first_token_ns),
            "stages": [
                {
                    "name": span.name,
                    "process": span.process,
                    "start_s": self.seconds(span.start_ns),
                    "end_s": self.seconds(span.end_ns),
                    **({} if span.note is None else {"note": span.note}),
                    **({} if span.waits_for is None else {"waits_for": span.waits_for}),
                }
                for span in self.spans
            ],
            "critical_path": [
                {
                    "name": step.name,
                    "process": step.process,
                    "start_s": self.seconds(step.start_ns),
                    "end_s": self.seconds(step.end_ns),
                }
                for step in self.critical_path()
            ],
            "unattributed_s": self.unattributed_s(),
        }


def _owners(
    spans: Sequence[Span], worker: str | None, start_ns: int, end_ns: int
) -> list[PathStep]:
    """Cuts the time at every span's edge and asks for each piece whose it is."""
    edges = {start_ns, end_ns}
    for span in spans:
        edges.update(e for e in (span.start_ns, span.end_ns) if start_ns < e < end_ns)
    cuts = sorted(edges)
    steps = []
    for left, right in pairwise(cuts):
        active = [s for s in spans if s.start_ns <= left and s.end_ns >= right]
        name, process = _owner(active, worker)
        steps.append(PathStep(name, process, left, right))
    return steps


def _owner(active: Sequence[Span], worker: str | None) -> tuple[str, str]:
    mine = [s for s in active if s.process == worker]
    busy = [s for s in mine if s.waits_for is None]
    waits = [s for s in mine if s.waits_for is not None]
    # Whatever the worker's main thread does comes before what its second thread does meanwhile.
    main = [s for s in busy if s.name != "tokenizer"]
    if main:
        name, _ = _innermost(main)
        # A clone does nothing itself before its image has been found and read.
        makers = [s for s in active if s.process == _SNAPSHOT and s.waits_for is None]
        return _innermost(makers if makers and name == "snapshot_restore" else main)
    if busy and waits:
        return _innermost(busy)
    others = [s for s in active if s.process != worker and s.waits_for is None]
    memory = [s for s in others if s.process == _MEMORY]
    front = [s for s in others if s.process == _FRONT]
    waits_for_request = any(s.waits_for == "request" for s in waits)
    for group in (front, memory) if waits_for_request or not waits else (memory, front):
        if group:
            return _innermost(group)
    if busy:
        return _innermost(busy)
    return UNATTRIBUTED, ""


def _innermost(spans: Sequence[Span]) -> tuple[str, str]:
    span = max(spans, key=lambda s: s.start_ns)
    return span.name, span.process


def _merge(steps: Iterable[PathStep]) -> list[PathStep]:
    """Joins neighbours that belong to the same stage."""
    merged: list[PathStep] = []
    for step in steps:
        if merged and (merged[-1].name, merged[-1].process) == (step.name, step.process):
            merged[-1] = PathStep(step.name, step.process, merged[-1].start_ns, step.end_ns)
        else:
            merged.append(step)
    return merged
