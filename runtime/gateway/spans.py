"""Spans made of what was noted of requests, and sent to a collector by OTLP over HTTP.

Imported in the thread of `coldframe.runtime.gateway.tracing` alone: the SDK takes 80 ms.
It reads its options (endpoint, headers, resource, sampler, batches) from the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    TELEMETRY_SDK_LANGUAGE,
    TELEMETRY_SDK_NAME,
    TELEMETRY_SDK_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.version import __version__ as sdk_version
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from coldframe.runtime.gateway.tracing import ColdStart, RequestRecord

__all__ = ["SpanExport", "prepare"]

_METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
_MOST_FINISHES = 128

try:
    # Now: a process that gives up its rights behind this import may not read the file later.
    _VERSION: str | None = version("coldframe")
except PackageNotFoundError:
    _VERSION = None

_Attributes = dict[str, Any]


class SpanExport:
    """Makes spans and sends them, some at a time.

    Args:
        to_wall_ns: What to add to CLOCK_MONOTONIC to get nanoseconds since 1970.
    """

    def __init__(self, to_wall_ns: int) -> None:
        self._to_wall_ns = to_wall_ns
        # Not at the interpreter's exit: that would wait for a collector that is gone.
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("coldframe", _VERSION)
        self._propagator = TraceContextTextMapPropagator()
        self._told: dict[str, tuple[ColdStart, SpanContext]] = {}
        """The last cold start of each model, and the span that has its stages."""

    def close(self) -> None:
        """Sends the rest."""
        self._provider.shutdown()

    def add(self, record: RequestRecord, start: ColdStart | None) -> None:
        """One request that is over.

        Args:
            record: What was noted of it.
            start: The cold start that it waited for, where it did and that is known.
        """
        assert record.ended_ns is not None
        method = record.method if record.method in _METHODS else "_OTHER"
        name = f"{'HTTP' if method == '_OTHER' else method} {record.route}".strip()
        parent = self._propagator.extract(_headers(record), Context())
        about = _of_request(record, method)
        span = self._open(name, parent, record.arrived_ns, about, SpanKind.SERVER)
        if record.error is not None:
            span.set_attribute("error.type", record.error)
        if record.error is not None and (record.status is None or record.status < 400):
            span.set_status(StatusCode.ERROR, record.error)  # in the middle of a stream
        elif record.status is not None and record.status >= 500:
            span.set_status(StatusCode.ERROR, record.error)
        inside = set_span_in_context(span, Context())
        if start is not None:
            self._add_start(record, start, span, inside)
        self._add_phases(record, inside)
        self._close(span, record.ended_ns)

    def _add_phases(self, record: RequestRecord, inside: Context) -> None:
        """What a request did, one after the other; each phase up to where it came."""
        if record.model is None:
            return  # it was not about tokens
        moments = (record.arrived_ns, record.submitted_ns, record.first_ns, record.last_ns)
        for number, name in enumerate(("queue", "prefill", "decode")):
            begin, end = moments[number], moments[number + 1]
            if begin is None:
                return
            stop = record.ended_ns if end is None else end
            assert stop is not None
            self._close(self._open(name, inside, begin, {}), max(begin, stop))

    def _add_start(
        self, record: RequestRecord, start: ColdStart, parent: Span, inside: Context
    ) -> None:
        """The cold start: whole, with its stages, for one request; the others point there."""
        attributes: _Attributes = {"coldframe.model": start.model}
        if start.tier is not None:
            attributes["coldframe.tier"] = start.tier
        if start.device is not None:
            attributes["coldframe.device"] = start.device
        # The front notes the first token behind its sending: the gateway may have heard it before.
        ended = start.end_ns if record.first_ns is None else min(start.end_ns, record.first_ns)
        told = self._told.get(start.model)
        if told is not None and told[0] is start:
            begin = max(start.exec_ns, record.arrived_ns)
            links = [Link(told[1])]
            span = self._open("cold_start", inside, begin, attributes, links=links)
            self._close(span, max(begin, ended))
            return
        span = self._open("cold_start", inside, start.exec_ns, attributes)
        if parent.is_recording():
            self._told[start.model] = start, span.get_span_context()
            within = set_span_in_context(span, Context())
            for stage in start.timeline.get("stages", ()):
                self._add_stage(stage, start.exec_ns, within)
        self._close(span, max(start.exec_ns, ended))

    def _add_stage(self, stage: Mapping[str, Any], exec_ns: int, within: Context) -> None:
        attributes: _Attributes = {"coldframe.process": str(stage["process"])}
        for key in ("note", "waits_for"):
            if stage.get(key) is not None:
                attributes[f"coldframe.{key}"] = str(stage[key])
        begin, end = (exec_ns + int(1e9 * stage[key]) for key in ("start_s", "end_s"))
        self._close(self._open(str(stage["name"]), within, begin, attributes), end)

    def _open(
        self,
        name: str,
        context: Context,
        start_ns: int,
        attributes: _Attributes,
        kind: SpanKind = SpanKind.INTERNAL,
        links: list[Link] | None = None,
    ) -> Span:
        return self._tracer.start_span(
            name,
            context=context,
            kind=kind,
            attributes=attributes,
            links=links,
            start_time=start_ns + self._to_wall_ns,
        )

    def _close(self, span: Span, end_ns: int) -> None:
        span.end(end_time=end_ns + self._to_wall_ns)


def prepare() -> None:
    """Imports what an exporter imports when it is made and when it first sends.

    For a process that may not read its interpreter's files later. It starts no thread.
    """
    import netrc  # noqa: F401 - requests does, at each request

    OTLPSpanExporter()


def _of_request(record: RequestRecord, method: str) -> _Attributes:
    """A server span's attributes (opentelemetry.io/docs/specs/semconv: HTTP, and gen-ai)."""
    found: _Attributes = {"http.request.method": method, "http.route": record.route}
    if record.status is not None:
        found["http.response.status_code"] = record.status
    if record.model is None:
        return found
    found |= {
        **record.asked,
        "gen_ai.provider.name": "coldframe",
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.tokens,
        "coldframe.cold": record.cold,
    }
    if record.operation is not None:
        found["gen_ai.operation.name"] = record.operation
    if record.finishes:
        found["gen_ai.response.finish_reasons"] = record.finishes[:_MOST_FINISHES]
    if record.first_ns is not None:
        waited_s = (record.first_ns - record.arrived_ns) / 1e9
        found["gen_ai.response.time_to_first_chunk"] = waited_s
    return found


def _headers(record: RequestRecord) -> dict[str, str]:
    given = {"traceparent": record.traceparent, "tracestate": record.tracestate}
    return {name: value for name, value in given.items() if value is not None}


def _resource() -> Resource:
    """What the environment says of us, and a name where it says none.

    `Resource.create` would look for detectors among all installed packages, whose files a process
    without rights may not be able to read.
    """
    ours = Resource(
        {
            SERVICE_NAME: "coldframe",
            TELEMETRY_SDK_NAME: "opentelemetry",
            TELEMETRY_SDK_LANGUAGE: "python",
            TELEMETRY_SDK_VERSION: sdk_version,
        }
    )
    return ours.merge(OTELResourceDetector().detect())
