"""Requests as OpenTelemetry spans, for who has a collector; for all others nothing is imported.

A request notes a few moments as it goes by. The SDK, which takes 80 ms to import, is fetched in a
thread once the first request is over, and makes spans of the notes afterwards: with their own
times, in the trace that the request's `traceparent` names. Neither a collector that is slow or gone
nor a missing SDK is ever waited for. Prompts and answers do not go into spans.

Names are those of the semantic conventions for HTTP servers and generative AI.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

# The exporter imports the SDK; it is fetched in the thread.
if TYPE_CHECKING:
    from coldframe.runtime.gateway.spans import SpanExport

__all__ = ["ColdStart", "RequestRecord", "Tracing", "open_tracing"]

_KEPT = 1024
"""Requests that wait for the exporter at most; those beyond are not traced."""
_TIMELINE_S = 5.0
"""How long a request's spans wait for the timeline of the cold start that it waited for."""
_CLOSE_S = 3.0
_LONGEST_HEADER = 1024


@dataclass(slots=True)
class RequestRecord:
    """What is noted of one HTTP request; all times are CLOCK_MONOTONIC, in nanoseconds.

    Args:
        method: GET, POST, ...
        route: The route's template.
        traceparent: The W3C header, as it came.
        tracestate: Its companion.
        arrived_ns: When the request's head was there.

    Attributes:
        model: The model card's name.
        operation: `chat` or `text_completion`.
        cold: Whether it waited for a cold start.
        asked: What was asked for, by the conventions' names: `gen_ai.request.max_tokens`, ...
        status: Of the answer.
        prompt_tokens: Of all its prompts.
        tokens: Made for it.
        finishes: Why its sequences ended, each with its own.
        error: What went wrong: a word, such as an error's code.
    """

    method: str
    route: str
    traceparent: str | None = None
    tracestate: str | None = None
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    model: str | None = None
    operation: str | None = None
    cold: bool = False
    asked: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    status: int | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    finishes: list[str] = field(default_factory=list)
    error: str | None = None
    submitted_ns: int | None = None
    first_ns: int | None = None
    last_ns: int | None = None
    ended_ns: int | None = None

    def submitted(self) -> None:
        """Its first sequence was given to a worker."""
        if self.submitted_ns is None:
            self.submitted_ns = time.monotonic_ns()

    def token(self) -> None:
        """A token has come."""
        self.last_ns = time.monotonic_ns()
        if self.first_ns is None:
            self.first_ns = self.last_ns
        self.tokens += 1


@dataclass(frozen=True, slots=True)
class ColdStart:
    """The start of a replica, for the requests that waited for it.

    Args:
        model: Its model's name.
        timeline: Its document (`Timeline.to_json`): times in seconds from the exec on.
        exec_ns: The exec, in CLOCK_MONOTONIC.
        tier: How the workers came to be.
        device: Where they compute.
    """

    model: str
    timeline: Mapping[str, Any]
    exec_ns: int
    tier: str | None = None
    device: str | None = None

    @property
    def end_ns(self) -> int:
        """When its first token was out."""
        return self.exec_ns + int(1e9 * (self.timeline.get("ttft_s") or 0.0))


class Tracing:
    """Takes records, and exports them in a thread of its own.

    Args:
        warn: Told what is wrong; in the thread.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._queue: queue.SimpleQueue[RequestRecord | None] = queue.SimpleQueue()
        self._cold_starts: dict[str, ColdStart] = {}
        """The last one of each model."""
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        # Spans are in wall-clock time. One difference for all keeps them in order.
        self._to_wall_ns = time.time_ns() - time.monotonic_ns()

    def request(
        self, method: str, route: str, traceparent: str | None = None, tracestate: str | None = None
    ) -> RequestRecord:
        """A request has come in; hand the record to `finish` when it has been answered."""
        if traceparent is not None and len(traceparent) > _LONGEST_HEADER:
            traceparent = None
        if tracestate is not None and len(tracestate) > _LONGEST_HEADER:
            tracestate = None
        return RequestRecord(method, route, traceparent, tracestate)

    def finish(self, record: RequestRecord) -> None:
        """The request is over; its spans are made and sent some time later."""
        if self._closed or self._queue.qsize() >= _KEPT:
            return
        if record.ended_ns is None:
            record.ended_ns = time.monotonic_ns()
        self._queue.put(record)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tracing", daemon=True)
            self._thread.start()

    def cold_start(self, start: ColdStart) -> None:
        """The timeline of the start is known; those that waited for it get its stages."""
        with self._news:
            self._cold_starts[start.model] = start
            self._news.notify()

    def close(self, seconds: float = _CLOSE_S) -> None:
        """Sends what there is, for so long at most; the process may end then."""
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            from coldframe.runtime.gateway.spans import SpanExport

            export = SpanExport(self._to_wall_ns)
        except ImportError as error:
            self._give_up(
                f"no traces are exported: {error}. Install coldframe with the extra `otel`."
            )
            return
        except Exception as error:  # noqa: BLE001 - what the environment says may be anything
            self._give_up(f"no traces are exported: {error!r}")
            return
        while (record := self._queue.get()) is not None:
            self._send(export, record)
        export.close()

    def _send(self, export: SpanExport, record: RequestRecord) -> None:
        try:
            export.add(record, self._start_of(record) if record.cold else None)
        except Exception as error:  # noqa: BLE001 - a span that cannot be made harms nobody
            self._warn(f"a request could not be traced: {error!r}")

    def _start_of(self, record: RequestRecord) -> ColdStart | None:
        """The cold start that a request waited for. Its spans come behind the first token."""
        assert record.ended_ns is not None
        patience_s = _TIMELINE_S - (time.monotonic_ns() - record.ended_ns) / 1e9
        with self._news:
            self._news.wait_for(lambda: self._closed or self._known(record), max(0.0, patience_s))
            return self._known(record)

    def _known(self, record: RequestRecord) -> ColdStart | None:
        start = self._cold_starts.get(record.model or "")
        return start if start is not None and start.end_ns > record.arrived_ns else None

    def _give_up(self, why: str) -> None:
        self._closed = True
        self._warn(why)
        while not self._queue.empty():
            self._queue.get()


def open_tracing(environment: Mapping[str, str], warn: Callable[[str], None]) -> Tracing | None:
    """Tracing, if the environment names a collector; by OpenTelemetry's own variables.

    Args:
        environment: `OTEL_EXPORTER_OTLP_ENDPOINT` and `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` switch
            it on; `OTEL_SDK_DISABLED` and `OTEL_TRACES_EXPORTER=none` off again.
        warn: Told, once, what is wrong with the set-up.
    """
    named = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not any(environment.get(name, "").strip() for name in named):
        return None
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() == "none":
        return None
    protocol = environment.get(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "")
    ).strip()
    if protocol not in ("", "http/protobuf"):
        warn(f"traces are exported by http/protobuf, not by {protocol[:40]!r}")
    return Tracing(warn)
