"""What is counted is what Prometheus reads, in both of its formats, with its own parsers."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import parser
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as strict_families

from coldframe.runtime.endpoint.frontstats import FrontStats
from coldframe.runtime.gateway.metrics import Metrics, RequestTrace

OPENMETRICS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
HISTOGRAMS = {
    "coldframe_time_to_first_token_seconds",
    "coldframe_inter_token_latency_seconds",
    "coldframe_e2e_request_latency_seconds",
    "coldframe_request_queue_time_seconds",
}
FRONT = FrontStats(
    kv_blocks_used=3,
    kv_blocks_cached=2,
    kv_blocks_total=8,
    kv_blocks_reused=1,
    prefilled_by_decode=4,
    prefill_batch_tokens=128,
    prefill_tokens_waiting=512,
    kv_store={"disk_stored": 4, "memory_loaded": 2, "disk_bytes": 9, "corrupt": 1, "paused": 1},
    kv_tickets={"kv_ticket_taken": 5, "kv_ticket_taken_bytes": 4096},
    weights_bytes=1000,
    bytes_loaded=3000,
    load_s=1.5,
    cold_starts={"image": 2, "fresh": 1},
    stages={"prefill": 0.25, "weight_read": 1.0},
    critical={"unattributed": 0.01},
    zero_s=100.0,
    device_s={"cuda:0": {"used": 7.0, "idle": 1.0}, "cpu": {"used": 20.0, "idle": 5.0}},
    device_faults={"fallback": 1},
    workers={"decode": {"up": 0, "leaving": 1}, "vllm": {"up": 1}},
    vllm_events={"takeover": 2, "died": 1},
    prewarms={"begun": 3, "used": 2},
    memory={"memory": {"anon": 11, "shmem": 22}, "gateway": {"anon": 33}},
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def families(text: bytes) -> dict[str, Metric]:
    found = parser.text_string_to_metric_families(text.decode())
    return {family.name: family for family in found}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    """One sample, read back by Prometheus's parser."""
    return one(families(metrics.render({})[0]).values(), name, **labels)


def one(found: Iterable[Metric], name: str, **labels: str) -> float:
    hits = [
        sample.value
        for family in found
        for sample in family.samples
        if sample.name == f"coldframe_{name}" and sample.labels == labels
    ]
    assert len(hits) == 1, (name, labels)
    return hits[0]


def a_busy_day(clock: Clock, metrics: Metrics) -> None:
    """A request of each kind."""
    answered = metrics.begin("m")
    clock.now += 2
    answered.submitted()
    clock.now += 1
    answered.token(prompt_tokens=7)
    for _ in range(4):
        clock.now += 0.004
        answered.token(prompt_tokens=7)
    answered.end("stop")
    left = metrics.begin("m")
    left.token(3)
    left.gone()
    metrics.begin("m").refused("deadline")
    metrics.refused("unauthorized")
    metrics.answered("POST", "/v1/completions", 200)
    metrics.answered("POST", "/v1/completions", 200)
    metrics.answered("GET", "", 404)


# -- what is counted ------------------------------------------------------------------------------


def test_a_request_from_its_arrival_to_its_last_token() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    a_busy_day(clock, metrics)
    first, queue = "time_to_first_token_seconds", "request_queue_time_seconds"
    assert value(metrics, f"{first}_sum", model="m") == 3.0
    assert value(metrics, f"{first}_count", model="m") == 2
    assert value(metrics, f"{first}_bucket", model="m", le="2.5") == 1
    assert value(metrics, f"{first}_bucket", model="m", le="5.0") == 2
    assert value(metrics, f"{queue}_sum", model="m") == 2.0
    assert value(metrics, "inter_token_latency_seconds_count", model="m") == 4
    assert value(metrics, "inter_token_latency_seconds_sum", model="m") == pytest.approx(0.016)
    assert value(metrics, "inter_token_latency_seconds_bucket", model="m", le="0.003") == 0
    assert value(metrics, "inter_token_latency_seconds_bucket", model="m", le="0.005") == 4
    assert value(metrics, "e2e_request_latency_seconds_sum", model="m") == pytest.approx(3.016)
    assert value(metrics, "e2e_request_latency_seconds_count", model="m") == 1
    assert value(metrics, "prompt_tokens_total", model="m") == 10
    assert value(metrics, "generation_tokens_total", model="m") == 6
    success = "request_success_total"
    assert value(metrics, success, model="m", finished_reason="stop") == 1
    assert value(metrics, success, model="m", finished_reason="length") == 0
    assert value(metrics, "request_failure_total", model="m", reason="gone") == 1
    assert value(metrics, "requests_refused_total", model="m", reason="deadline") == 1
    assert value(metrics, "requests_refused_total", model="", reason="unauthorized") == 1
    route = {"method": "POST", "route": "/v1/completions", "status": "200"}
    assert value(metrics, "http_requests_total", **route) == 2


def test_requests_wait_run_and_are_gone() -> None:
    metrics = Metrics(Clock())

    def counts() -> tuple[float, float]:
        names = ("num_requests_waiting", "num_requests_running")
        waiting, running = (value(metrics, name, model="m") for name in names)
        return waiting, running

    one, two, three = (metrics.begin("m") for _ in range(3))
    assert counts() == (3, 0)
    one.submitted()
    one.submitted()  # its second sequence
    assert counts() == (2, 1)
    two.token()  # a token is proof enough
    assert counts() == (1, 2)
    one.end("length")
    three.refused("queue_full")
    two.refused("model_error")
    assert counts() == (0, 0)
    assert value(metrics, "request_failure_total", model="m", reason="error") == 1
    assert value(metrics, "requests_refused_total", model="m", reason="queue_full") == 1


def test_what_comes_after_the_end_counts_for_nothing() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    a_busy_day(clock, metrics)
    ended = metrics.begin("m")
    ended.token()
    ended.end("length")
    before = metrics.render({"m": FRONT})

    def calls(trace: RequestTrace) -> None:
        trace.submitted()
        trace.token(9)
        trace.end("stop")
        trace.gone()
        trace.refused("deadline")

    calls(ended)
    assert metrics.render({"m": FRONT}) == before


def test_time_between_tokens_is_that_of_each_sequence() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    trace = metrics.begin("m")
    for _ in range(3):
        clock.now += 0.5
        for choice in range(4):
            trace.token(prompt_tokens=5, choice=choice)
    assert value(metrics, "inter_token_latency_seconds_count", model="m") == 8
    assert value(metrics, "inter_token_latency_seconds_sum", model="m") == 4.0
    assert value(metrics, "time_to_first_token_seconds_count", model="m") == 1
    assert value(metrics, "prompt_tokens_total", model="m") == 20


def test_a_request_may_have_arrived_before_it_was_read() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    metrics.begin("m", arrived=clock.now - 5).token()
    assert value(metrics, "time_to_first_token_seconds_sum", model="m") == 5


@given(st.lists(st.floats(0, 1000) | st.sampled_from([0.001, 0.25, 5.0, 500.0]), max_size=40))
def test_a_histogram_says_how_many_were_at_most_so_long(waits: list[float]) -> None:
    clock = Clock()
    clock.now = 0.0  # so that sums are exact
    metrics = Metrics(clock)
    for wait in waits:
        metrics.begin("m", arrived=-wait).token()
    metrics.model("m")
    found = families(metrics.render({})[0])["coldframe_time_to_first_token_seconds"]
    for sample in found.samples:
        if "le" in sample.labels:
            assert sample.value == sum(wait <= float(sample.labels["le"]) for wait in waits)


# -- what the front says --------------------------------------------------------------------------


def test_what_the_front_says_is_told() -> None:
    metrics = Metrics(Clock())
    found = list(families(metrics.render({"m": FRONT})[0]).values())
    assert one(found, "kv_blocks", model="m", state="used") == 3
    assert one(found, "kv_blocks", model="m", state="cached") == 2
    assert one(found, "kv_blocks", model="m", state="free") == 3
    assert one(found, "kv_blocks_reused_total", model="m") == 1
    assert one(found, "kv_store_stored_blocks_total", model="m", tier="disk") == 4
    assert one(found, "kv_store_stored_blocks_total", model="m", tier="memory") == 0
    assert one(found, "kv_store_loaded_blocks_total", model="m", tier="memory") == 2
    assert one(found, "kv_store_bytes", model="m", tier="disk") == 9
    assert one(found, "kv_store_lost_blocks_total", model="m", reason="corrupt") == 1
    assert one(found, "kv_store_lost_blocks_total", model="m", reason="unreadable") == 0
    assert one(found, "kv_store_lost_blocks_total", model="m", reason="unwritten") == 0
    assert one(found, "kv_store_pauses_total", model="m") == 0
    assert one(found, "kv_store_paused", model="m") == 1
    assert one(found, "kv_tickets_total", model="m", outcome="taken") == 5
    assert one(found, "kv_tickets_total", model="m", outcome="lost") == 0
    assert one(found, "kv_taken_bytes_total", model="m") == 4096
    assert one(found, "requests_prefilled_by_decode_total", model="m") == 4
    assert one(found, "prefill_batch_tokens", model="m") == 128
    assert one(found, "prefill_tokens_waiting", model="m") == 512
    assert one(found, "coldstarts_total", model="m", tier="image") == 2
    assert one(found, "coldstarts_total", model="m", tier="template") == 0
    assert one(found, "coldstart_stage_seconds", model="m", stage="prefill") == 0.25
    assert one(found, "coldstart_critical_seconds", model="m", stage="unattributed") == 0.01
    assert one(found, "weights_bytes", model="m") == 1000
    assert one(found, "weights_loaded_bytes_total", model="m") == 3000
    assert one(found, "weights_load_seconds_total", model="m") == 1.5
    assert one(found, "zero_seconds_total", model="m") == 100
    assert one(found, "device_seconds_total", model="m", device="cpu", state="used") == 20
    assert one(found, "device_seconds_total", model="m", device="cpu", state="idle") == 5
    assert one(found, "device_seconds_total", model="m", device="cuda:0", state="used") == 7
    assert one(found, "device_faults_total", model="m", kind="fallback") == 1
    assert one(found, "device_faults_total", model="m", kind="lost") == 0
    assert one(found, "workers", model="m", role="decode", state="leaving") == 1
    assert one(found, "workers", model="m", role="vllm", state="up") == 1
    assert one(found, "vllm_events_total", model="m", event="takeover") == 2
    assert one(found, "prewarms_total", model="m", event="begun") == 3
    assert one(found, "prewarms_total", model="m", event="vain") == 0
    assert one(found, "vllm_events_total", model="m", event="failed_start") == 0
    assert one(found, "process_memory_bytes", model="m", process="memory", kind="shmem") == 22


def test_without_the_front_the_gateways_own_numbers_are_told() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    a_busy_day(clock, metrics)
    names = set(families(metrics.render({})[0]))
    assert "coldframe_num_requests_waiting" in names
    assert "coldframe_kv_blocks" not in names


# -- the formats ----------------------------------------------------------------------------------


def test_both_formats_say_the_same() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    a_busy_day(clock, metrics)
    text, kind = metrics.render({"m": FRONT})
    assert kind.startswith("text/plain; version=0.0.4")
    opened, open_kind = metrics.render({"m": FRONT}, OPENMETRICS)
    assert open_kind.startswith("application/openmetrics-text; version=1.0.0")
    assert opened.endswith(b"# EOF\n")

    def samples(found: Iterable[Metric]) -> set[tuple[str, tuple[tuple[str, str], ...], float]]:
        return {
            (s.name, tuple(sorted(s.labels.items())), s.value)
            for family in found
            for s in family.samples
        }

    plain = parser.text_string_to_metric_families(text.decode())
    # This parser refuses histograms that contradict themselves, and names that break the rules.
    strict = strict_families(opened.decode())
    assert samples(plain) == samples(strict)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=abc",
        'application/openmetrics-text; version="2; escaping=nonsense"',
        "text/plain; version=1.0.0; escaping=allow-utf-8\r\nx-evil: 1",
        "text/plain; version=x",
        "\x00, ;;;=,",
    ],
)
def test_nothing_of_the_accept_header_comes_back(accept: str) -> None:
    body, kind = Metrics(Clock()).render({"m": FRONT}, accept)
    assert re.fullmatch(r"(application/openmetrics-text|text/plain); version=[01.4]+; .*", kind)
    assert not re.search(r"evil|nonsense|abc|\"|\n", kind)
    assert body.startswith(b"# ")


def test_names_keep_to_the_rules() -> None:
    """promtool's `check metrics`: units spelled out, totals for counters only, texts for all."""
    clock = Clock()
    metrics = Metrics(clock)
    a_busy_day(clock, metrics)
    text = metrics.render({"m": FRONT})[0].decode()
    typed = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helped = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert set(typed) == set(helped)
    for name, kind in typed.items():
        assert re.fullmatch(r"coldframe_[a-z0-9]+(_[a-z0-9]+)*", name)
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"_(count|sum|bucket|info|gauge|counter|histogram)$", name), name
        assert not re.search(r"milli|micro|_ms\b|_ns\b|minute|kilo|mega|percent", name), name
        assert not re.search(r"seconds(?!$|_total$)|bytes(?!$|_total$)", name), name
        assert helped[name].endswith("."), name
    assert {name for name, kind in typed.items() if kind == "histogram"} == HISTOGRAMS
    expected = {
        "coldframe_num_requests_running": "gauge",
        "coldframe_num_requests_waiting": "gauge",
        "coldframe_request_success_total": "counter",
        "coldframe_coldstart_stage_seconds": "gauge",
    }
    assert expected.items() <= typed.items()
    # Prefixes of one another, names can be mistaken for a histogram's parts.
    assert len({name.removesuffix("_total") for name in typed}) == len(typed)


def test_labels_are_quoted_whatever_they_are() -> None:
    metrics = Metrics(Clock())
    hostile = 'a"b\\c\nd{e="f"} # HELP x'
    metrics.begin(hostile).token()
    metrics.begin("half \udce4 letter").token()
    for accept in ("", OPENMETRICS):
        text = metrics.render({}, accept)[0].decode()
        found = strict_families(text) if accept else parser.text_string_to_metric_families(text)
        models = {s.labels["model"] for f in found for s in f.samples if "model" in s.labels}
        assert models == {hostile, "half ? letter"}


def test_a_scrape_in_a_thread_does_not_disturb_the_loop() -> None:
    metrics = Metrics()
    stop = threading.Event()
    failures: list[BaseException] = []

    def scrape() -> None:
        try:
            while not stop.is_set():
                strict = metrics.render({"m": FRONT}, OPENMETRICS)[0].decode()
                list(strict_families(strict))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    thread = threading.Thread(target=scrape)
    thread.start()
    for number in range(2000):
        trace = metrics.begin(f"m{number % 20}")
        trace.token()
        trace.token()
        trace.end("stop")
        metrics.answered("GET", f"/{number % 50}", 200)
        metrics.refused(f"r{number % 50}")
    stop.set()
    thread.join()
    assert not failures


def test_prometheus_is_not_imported_before_somebody_scrapes() -> None:
    program = (
        "import sys\n"
        "from coldframe.runtime.gateway.metrics import Metrics\n"
        "metrics = Metrics()\n"
        "trace = metrics.begin('m'); trace.submitted(); trace.token(); trace.end('stop')\n"
        "assert not any(name.startswith('prometheus') for name in sys.modules)\n"
        "metrics.render({})\n"
        "assert 'prometheus_client' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
