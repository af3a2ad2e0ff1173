"""A real replica as those see it who watch: the page, Prometheus, and a collector of traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from selenium.webdriver.common.keys import Keys

from tests.runtime.gateway.browser import chromium, until
from tests.runtime.gateway.collector import Collector, running, values
from tests.runtime.serving import Server, served

pytestmark = pytest.mark.heavy

Make = Callable[..., Path]


def scrape(server: Server) -> dict[tuple[str, ...], float]:
    """All samples: the name, and the labels' values in the order of theirs, without the model's."""
    headers = {"accept": "application/openmetrics-text; version=1.0.0"}
    answer = httpx.get(f"{server.url}/metrics", headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return {
        (s.name.removeprefix("coldframe_"), *(v for k, v in s.labels.items() if k != "model")): (
            s.value
        )
        for family in text_string_to_metric_families(answer.text)
        for s in family.samples
    }


def test_the_page_of_a_replica(demo_model: Make, tmp_path: Path) -> None:
    key = "sk-0123456789abcdef-page"
    with (
        chromium(tmp_path) as browser,
        # As slow as this, the page is there while the weights are still on their way.
        served(
            demo_model("llama"), "--throttle", "800kB/s", "--copy", COLDFRAME_API_KEYS=key
        ) as server,
    ):
        until(lambda: server.port)
        browser.get(f"{server.url}/")
        field = browser.find_element("id", "key")
        until(field.is_displayed)
        field.send_keys(key, Keys.TAB)

        def text(name: str) -> str:
            return browser.find_element("id", name).text

        until(lambda: text("state") == "starting")
        until(lambda: "MB" in text("progress-text") or "kB" in text("progress-text"))
        prompt = browser.find_element("id", "prompt")
        prompt.send_keys("Once upon a time", Keys.CONTROL, Keys.ENTER)
        until(lambda: text("speed").startswith("first token after"), seconds=60)
        until(lambda: text("state") == "ready", seconds=30)
        until(lambda: "tokens/s" in text("speed"))
        until(lambda: browser.find_element("id", "go").is_enabled())
        assert browser.find_element("id", "answer").get_property("textContent")
        assert text("problem") == ""
        until(browser.find_element("id", "cold").is_displayed)
        assert "by fresh workers" in text("cold-text")
        rows = browser.find_elements("css selector", "#waterfall text")
        assert "memory weight_read" in [row.text for row in rows]


def test_what_prometheus_scrapes(demo_model: Make) -> None:
    with served(demo_model("llama")) as server:
        server.ready()
        before = scrape(server)
        body = {"prompt": "Once", "max_tokens": 5, "temperature": 0}
        assert server.post("/v1/completions", body).status_code == 200
        assert server.post("/v1/completions", {"prompt": 7}).status_code == 400
        with httpx.stream(
            "POST",
            f"{server.url}/v1/completions",
            json={**body, "n": 8, "max_tokens": 1000, "stream": True, "ignore_eos": True},
        ) as answer:
            assert answer.status_code == 200
            pieces = answer.iter_bytes()  # without it, httpx would take it that nobody reads on
            next(pieces)
            until(lambda: scrape(server)["kv_blocks", "used"] > 0)
            assert scrape(server)["num_requests_running",] == 1
            pieces.close()  # type: ignore[attr-defined]
        until(lambda: scrape(server).get(("num_requests_running",)) == 0)
        until(lambda: scrape(server)["kv_blocks", "used"] == 0)
        found = scrape(server)
    finished = [found.get(("request_success_total", why), 0) for why in ("stop", "length")]
    assert sum(finished) == 1
    assert found["request_failure_total", "gone"] == 1
    assert found["time_to_first_token_seconds_count",] == 2
    assert found["e2e_request_latency_seconds_count",] == 1
    assert found["coldstarts_total", "fresh"] == before["coldstarts_total", "fresh"] == 1
    assert found["weights_loaded_bytes_total",] == found["weights_bytes",] > 0
    assert found["kv_blocks", "free"] > 0
    assert found["coldstart_stage_seconds", "prefill"] > 0
    assert found["device_seconds_total", "cpu", "idle"] > 0
    assert found["device_seconds_total", "cpu", "used"] > 0
    assert found["process_memory_bytes", "anon", "memory"] > 0
    assert found["http_requests_total", "POST", "/v1/completions", "400"] == 1
    refused = sum(v for name, v in found.items() if name[0] == "requests_refused_total")
    assert refused == 1


def test_what_a_collector_gets(demo_model: Make) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    with (
        running(Collector()) as collector,
        served(
            demo_model("llama"),
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
            OTEL_BSP_SCHEDULE_DELAY="50",
        ) as server,
    ):
        until(lambda: server.port)
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "a very secret prompt", "max_tokens": 5, "ignore_eos": True},
            headers={"traceparent": f"00-{trace}-{parent}-01"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        until(lambda: any(span.name == "weight_read" for span in collector.spans))
        server.ready()  # a probe, and nobody's trace
    request = collector.named("POST /v1/completions")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (trace, parent)
    told = values(request)
    assert told["http.response.status_code"] == 200
    assert told["gen_ai.usage.output_tokens"] == 5
    assert told["coldframe.cold"] is True
    inside = collector.children(request)
    assert set(inside) == {"queue", "prefill", "decode", "cold_start"}
    start = inside["cold_start"]
    assert start.start_time_unix_nano < request.start_time_unix_nano
    # A worker made the token before the gateway heard of it.
    assert 0 <= inside["prefill"].end_time_unix_nano - start.end_time_unix_nano < 20e9
    assert {"imports", "plan", "prefill[head]"} <= set(collector.children(start))
    assert [s.name for s in collector.spans if s.kind == Span.SPAN_KIND_SERVER] == [request.name]
    sent = b"".join(message.SerializeToString() for message in collector.requests)
    assert b"very secret" not in sent
    assert abs(request.end_time_unix_nano - time.time_ns()) < 120e9
