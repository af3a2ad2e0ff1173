"""Spans as a collector gets them."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from coldframe.loader.timeline import Span as Stage
from coldframe.runtime.gateway.tracing import ColdStart, RequestRecord, Tracing, open_tracing
from coldframe.runtime.timeline.timeline import Timeline
from tests.runtime.gateway.collector import Collector, plain, running, values

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
MS = 1_000_000


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector, and an environment that names it."""
    with running(Collector()) as made:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
        yield made


class Warnings(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


def opened(warnings: Warnings | None = None) -> Tracing:
    made = open_tracing(os.environ, Warnings() if warnings is None else warnings)
    assert made is not None
    return made


def answered(tracing: Tracing, *, cold: bool = False, traceparent: str | None = None) -> None:
    """A request that went well, with times that can be told apart."""
    record = tracing.request("POST", "/v1/completions", traceparent)
    start = record.arrived_ns
    record.model, record.operation, record.cold = "a-model", "text_completion", cold
    record.asked = {"gen_ai.request.max_tokens": 9}
    record.submitted()
    record.submitted_ns = start + 1 * MS
    for _ in range(3):
        record.token()
    record.first_ns, record.last_ns = start + 5 * MS, start + 8 * MS
    record.prompt_tokens, record.status = 4, 200
    record.finishes.append("stop")
    record.ended_ns = start + 9 * MS
    tracing.finish(record)


def a_start(end_ns: int, model: str = "a-model") -> ColdStart:
    """A cold start of 100 ms with two stages, whose first token is out then."""
    exec_ns = end_ns - 100 * MS
    stages = [
        Stage("weight_read", "memory", exec_ns + 10 * MS, exec_ns + 80 * MS, "4 threads"),
        Stage("wait", "prefill-0", exec_ns + 20 * MS, exec_ns + 80 * MS, None, "stage_ready[0]"),
    ]
    document = Timeline(stages, exec_ns, end_ns).to_json()
    return ColdStart(model, document, exec_ns, "image")


# -- what a collector gets ------------------------------------------------------------------------


def test_a_request_is_a_server_span_with_its_phases(collector: Collector) -> None:
    tracing = opened()
    before = time.time_ns()
    answered(tracing)
    tracing.close()
    assert collector.paths == ["/v1/traces"]
    server = collector.named("POST /v1/completions")
    assert server.kind == Span.SPAN_KIND_SERVER
    assert server.parent_span_id == b""
    assert server.status.code == Status.STATUS_CODE_UNSET
    assert abs(server.start_time_unix_nano - before) < 60_000 * MS
    assert server.end_time_unix_nano - server.start_time_unix_nano == 9 * MS
    assert values(server) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "coldframe",
        "gen_ai.request.model": "a-model",
        "gen_ai.response.model": "a-model",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": pytest.approx(0.005),
        "coldframe.cold": False,
    }
    phases = collector.children(server)
    begin = server.start_time_unix_nano
    assert {
        name: (span.start_time_unix_nano - begin, span.end_time_unix_nano - begin)
        for name, span in phases.items()
    } == {"queue": (0, MS), "prefill": (MS, 5 * MS), "decode": (5 * MS, 8 * MS)}
    assert {span.trace_id for span in phases.values()} == {server.trace_id}


def test_the_callers_trace_goes_on(collector: Collector) -> None:
    tracing = opened()
    answered(tracing, traceparent=f"00-{TRACE}-{PARENT}-01")
    tracing.close()
    server = collector.named("POST /v1/completions")
    assert server.trace_id.hex() == TRACE
    assert server.parent_span_id.hex() == PARENT
    assert len(collector.children(server)) == 3


def test_what_the_caller_does_not_sample_is_not_sent(collector: Collector) -> None:
    tracing = opened()
    answered(tracing, traceparent=f"00-{TRACE}-{PARENT}-00")
    answered(tracing)
    tracing.close()
    assert len(collector.spans) == 4
    assert collector.named("POST /v1/completions").trace_id.hex() != TRACE


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-01", f"00-{TRACE}-{PARENT}-01" * 99])
def test_a_bad_traceparent_begins_a_trace(collector: Collector, header: str) -> None:
    tracing = opened()
    answered(tracing, traceparent=header)
    tracing.close()
    assert collector.named("POST /v1/completions").parent_span_id == b""


def test_requests_that_waited_for_a_cold_start_say_so(collector: Collector) -> None:
    tracing = opened()
    answered(tracing, cold=True)
    answered(tracing, cold=True)
    answered(tracing)
    end_ns = time.monotonic_ns() + MS
    tracing.cold_start(a_start(end_ns))  # its spans come behind the first token
    tracing.close()
    whole, pointing = [span for span in collector.spans if span.name == "cold_start"]
    assert whole.end_time_unix_nano - whole.start_time_unix_nano == 100 * MS
    assert values(whole) == {"coldframe.model": "a-model", "coldframe.tier": "image"}
    stages = collector.children(whole)
    assert set(stages) == {"weight_read", "wait"}
    read = stages["weight_read"]
    assert read.start_time_unix_nano - whole.start_time_unix_nano == pytest.approx(10 * MS, abs=99)
    assert values(read) == {"coldframe.process": "memory", "coldframe.note": "4 threads"}
    assert values(stages["wait"])["coldframe.waits_for"] == "stage_ready[0]"
    assert not collector.children(pointing)
    (link,) = pointing.links
    assert link.span_id == whole.span_id
    assert link.trace_id == whole.trace_id != pointing.trace_id
    servers = {s.span_id: s for s in collector.spans if s.kind == Span.SPAN_KIND_SERVER}
    assert len(servers) == 3
    for span in (whole, pointing):
        assert values(servers[span.parent_span_id])["coldframe.cold"] is True
    waited = servers[pointing.parent_span_id]
    assert pointing.start_time_unix_nano == waited.start_time_unix_nano


def test_an_earlier_cold_start_is_not_taken_for_the_one_that_was_waited_for(
    collector: Collector,
) -> None:
    tracing = opened()
    tracing.cold_start(a_start(time.monotonic_ns()))
    answered(tracing, cold=True)
    tracing.close()
    assert {span.name for span in collector.spans} == {
        "POST /v1/completions",
        "queue",
        "prefill",
        "decode",
    }


def test_errors(collector: Collector) -> None:
    tracing = opened()
    for status, code in ((400, "invalid_value"), (503, "deadline"), (200, "replica_error")):
        record = tracing.request("POST", f"/{code}")
        record.status, record.error = status, code
        tracing.finish(record)
    tracing.finish(tracing.request("BREW", ""))
    tracing.close()
    for name, status in (("invalid_value", 0), ("deadline", 2), ("replica_error", 2)):
        span = collector.named(f"POST /{name}")
        assert values(span)["error.type"] == name
        assert span.status.code == status  # a client's mistake is no error of the server
    assert values(collector.named("HTTP"))["http.request.method"] == "_OTHER"
    assert len(collector.spans) == 4  # no phases: none of them came so far


def test_a_request_that_ended_while_it_waited_has_no_more_phases(collector: Collector) -> None:
    tracing = opened()
    record = tracing.request("POST", "/v1/completions")
    record.model = "a-model"
    record.ended_ns = record.arrived_ns + 7 * MS
    tracing.finish(record)
    tracing.close()
    (phase,) = collector.children(collector.named("POST /v1/completions")).values()
    assert phase.name == "queue"
    assert phase.end_time_unix_nano - phase.start_time_unix_nano == 7 * MS


def test_the_environment_names_service_headers_and_place(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def services() -> list[str]:
        pairs = collector.requests[-1].resource_spans[0].resource.attributes
        return [plain(pair.value) for pair in pairs if pair.key == "service.name"]

    tracing = opened()
    answered(tracing)
    tracing.close()
    assert services() == ["coldframe"]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/elsewhere")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-model")
    tracing = opened()
    answered(tracing)
    tracing.close()
    assert services() == ["my-model"]
    assert collector.paths[-1] == "/elsewhere"
    assert collector.headers[-1]["x-key"] == "secret"


# -- what goes wrong ------------------------------------------------------------------------------


def test_a_collector_that_refuses_disturbs_nobody(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 400
    tracing = opened()
    with caplog.at_level(logging.CRITICAL):
        for _ in range(3):
            answered(tracing)
        tracing.close()
    assert collector.requests


def test_a_collector_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}"
        )
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
        tracing = opened()
        answered(tracing)
        tracing.close(0.05)
        assert tracing._thread is not None
        assert tracing._thread.is_alive()  # close came back before it
        tracing._thread.join(60)
        assert not tracing._thread.is_alive()


def test_more_requests_than_are_kept_are_forgotten(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldframe.runtime.gateway.tracing._KEPT", 2)
    tracing = opened()
    # The first waits for a timeline, the others behind it.
    answered(tracing, cold=True)
    while not tracing._queue.empty():
        time.sleep(0.001)
    for _ in range(20):
        answered(tracing)
    tracing.close()
    assert sum(span.name == "queue" for span in collector.spans) == 3


def test_what_comes_after_the_end_is_forgotten(collector: Collector) -> None:
    tracing = opened()
    tracing.close()
    answered(tracing)
    tracing.close()
    assert not collector.requests


def test_without_the_sdk_there_is_one_warning() -> None:
    program = (
        "import os, sys\n"
        "sys.modules['opentelemetry.sdk'] = None\n"
        "from coldframe.runtime.gateway.tracing import open_tracing\n"
        "warnings = []\n"
        "tracing = open_tracing({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://x'}, warnings.append)\n"
        "for _ in range(2):\n"
        "    tracing.finish(tracing.request('GET', '/'))\n"
        "    tracing._thread.join()\n"
        "tracing.close()\n"
        "assert len(warnings) == 1 and 'extra `otel`' in warnings[0], warnings\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_environment_that_the_sdk_cannot_read_is_one_warning(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")
    warnings = Warnings()
    tracing = opened(warnings)
    answered(tracing)
    tracing.close()
    assert len(warnings) == 1
    assert not collector.requests


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "True"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_where_nobody_collects_nothing_is_traced(environment: dict[str, str]) -> None:
    assert open_tracing(environment, pytest.fail) is None


def test_another_protocol_is_warned_of() -> None:
    warnings = Warnings()
    environment = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
    }
    assert open_tracing(environment, warnings) is not None
    assert "grpc" in warnings[0]


def test_the_sdk_is_not_imported_before_a_request_is_over() -> None:
    program = (
        "import sys\n"
        "from coldframe.runtime.gateway.tracing import open_tracing\n"
        "tracing = open_tracing({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://127.0.0.1:1'}, print)\n"
        "record = tracing.request('GET', '/')\n"
        "record.submitted(); record.token()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_record_notes_the_first_and_the_last_token() -> None:
    record = RequestRecord("GET", "/")
    record.submitted()
    record.token()
    first = record.first_ns
    record.submitted()
    record.token()
    assert (record.tokens, record.first_ns) == (2, first)
    assert record.submitted_ns is not None
    assert record.last_ns is not None
    assert first is not None
    assert record.submitted_ns <= first <= record.last_ns
