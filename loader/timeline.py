"""Spans: what each process did from when to when, recorded where it happens.

Recording is all that is here, since the processes on the cold-start path import it; tables,
pictures and the critical path are made from the spans later (`runtime/timeline/`).
Times are CLOCK_MONOTONIC in nanoseconds, in the clock of the process that started the replica.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Span", "Recorder", "now", "clock_shift_ns", "process_start_ns"]

now = time.monotonic_ns


@dataclass(frozen=True, slots=True)
class Span:
    """One stage of a cold start in one process.

    Args:
        name: A stage of the timeline's table, such as `weight_read` or `prefill[3]`.
        process: Who did it, such as `memory` or `prefill-0`.
        start_ns: CLOCK_MONOTONIC.
        end_ns: CLOCK_MONOTONIC.
        note: What a reader may want to know, in a few words.
        waits_for: For a span spent idle: the stage that it waited for.
    """

    name: str
    process: str
    start_ns: int
    end_ns: int
    note: str | None = None
    waits_for: str | None = None

    def to_wire(self) -> list[Any]:
        return [self.name, self.process, self.start_ns, self.end_ns, self.note, self.waits_for]

    @classmethod
    def from_wire(cls, data: list[Any]) -> Span:
        return cls(*data)


class Recorder:
    """Collects the spans of one process; safe to use from several threads.

    Args:
        process: Its name. It may be set later: a worker learns it when it is given its role.
    """

    def __init__(self, process: str) -> None:
        self.process = process
        self.offset_ns = 0
        """What to add to this process's clock to get the starter's: see `clock_shift_ns`."""
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def add(
        self,
        name: str,
        start_ns: int,
        end_ns: int | None = None,
        *,
        note: str | None = None,
        waits_for: str | None = None,
    ) -> None:
        end = now() if end_ns is None else end_ns
        with self._lock:
            self._spans.append(Span(name, self.process, start_ns, end, note, waits_for))

    @contextmanager
    def span(self, name: str, *, note: str | None = None) -> Iterator[None]:
        start = now()
        try:
            yield
        finally:
            self.add(name, start, note=note)

    def drain(self) -> list[Span]:
        """The spans since the last call, in the starter's clock."""
        with self._lock:
            spans, self._spans = self._spans, []
        shift, process = self.offset_ns, self.process
        return [
            Span(s.name, process, s.start_ns + shift, s.end_ns + shift, s.note, s.waits_for)
            for s in spans
        ]


def process_start_ns() -> int:
    """When this process was created, in CLOCK_MONOTONIC, to the 10 ms of the kernel's tick.

    `COLDFRAME_EXEC_NS`, set by whoever measures just before the exec, gives it exactly.
    """
    given = os.environ.get("COLDFRAME_EXEC_NS", "")
    if given.isdigit() and 0 <= now() - int(given) < 60_000_000_000:
        return int(given)
    with open("/proc/self/stat", "rb") as file:
        # The second field is the command in parentheses and may itself hold blanks and parentheses.
        fields = file.read().rpartition(b")")[2].split()
    ticks_since_boot = int(fields[19])
    since_boot = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    age = since_boot - ticks_since_boot * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return now() - age


def clock_shift_ns() -> int:
    """How far this process's CLOCK_MONOTONIC is ahead of the machine's, in nanoseconds.

    A process that was restored from an image lives in a time namespace, so that its clock goes on
    from where it was frozen; a container may live in one too (time_namespaces(7)). The difference
    of two processes' values is that of their clocks.
    """
    try:
        with open("/proc/self/timens_offsets") as file:
            for line in file:
                clock, seconds, nanoseconds = line.split()
                if clock == "monotonic":
                    return int(seconds) * 1_000_000_000 + int(nanoseconds)
    except OSError:  # a kernel without time namespaces has one clock for all
        pass
    return 0
