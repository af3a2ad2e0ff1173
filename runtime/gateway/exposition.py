"""The gateway's numbers as Prometheus and OpenMetrics read them.

Imported by the first scrape alone. A collector of our own makes the families from plain numbers
at each scrape: prometheus_client's instruments would take a lock and a dozen calls per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from coldframe.runtime.frontstats import FrontStats
from coldframe.runtime.gateway.metrics import Histogram, Metrics, ModelNumbers

__all__ = ["PREFIX", "render"]

PREFIX = "coldframe_"
_OPENMETRICS = "application/openmetrics-text"

_Labels = Mapping[tuple[str, ...], float]


def render(metrics: Metrics, stats: FrontStats | None, accept: str) -> tuple[bytes, str]:
    """See `Metrics.render`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(metrics, stats))
    # Versions and escapings of the client's are not taken over: they would go into our header.
    encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in accept else "")
    return encode(registry), content_type


class _Families(Collector):
    """One scrape's families."""

    def __init__(self, metrics: Metrics, stats: FrontStats | None) -> None:
        self._metrics = metrics
        self._stats = stats
        # The loop may add a model while this runs in a thread; a list is taken in one go.
        self._models = list(metrics.models.items())

    def describe(self) -> Iterable[Metric]:
        return ()  # one collector, and names that a test checks

    def collect(self) -> Iterator[Metric]:
        yield from self._latencies()
        yield from self._requests()
        if self._stats is not None:
            yield from _cold_starts(self._stats)
            yield from _resources(self._stats)

    def _latencies(self) -> Iterator[Metric]:
        for name, text, pick in _HISTOGRAMS:
            family = HistogramMetricFamily(PREFIX + name, text, labels=["model"])
            for model, numbers in self._models:
                histogram = pick(numbers)
                family.add_metric([_text(model)], _buckets(histogram), histogram.sum)
            yield family

    def _requests(self) -> Iterator[Metric]:
        models, metrics = self._models, self._metrics
        yield _gauge(
            "num_requests_running",
            "Requests that a worker has.",
            ["model"],
            {(model,): numbers.running for model, numbers in models},
        )
        yield _gauge(
            "num_requests_waiting",
            "Requests that wait for a worker, also while there is none.",
            ["model"],
            {(model,): numbers.waiting for model, numbers in models},
        )
        yield _counter(
            "prompt_tokens",
            "Tokens of the prompts of sequences that were begun.",
            ["model"],
            {(model,): numbers.prompt for model, numbers in models},
        )
        yield _counter(
            "generation_tokens",
            "Tokens made.",
            ["model"],
            {(model,): numbers.generated for model, numbers in models},
        )
        yield _counter(
            "request_success",
            "Requests that were answered to the end.",
            ["model", "finished_reason"],
            {
                (model, reason): count
                for model, numbers in models
                for reason, count in list(numbers.succeeded.items())
            },
        )
        yield _counter(
            "request_failure",
            "Requests that were not: the client was gone, or an error came in mid-answer.",
            ["model", "reason"],
            {
                (model, reason): count
                for model, numbers in models
                for reason, count in list(numbers.failed.items())
            },
        )
        yield _counter(
            "requests_refused",
            "Requests that were not taken, or waited in vain for a first token.",
            ["model", "reason"],
            dict(list(metrics.refusals.items())),
        )
        yield _counter(
            "http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            {
                (method, route, str(status)): count
                for (method, route, status), count in list(metrics.responses.items())
            },
        )


def _cold_starts(stats: FrontStats) -> Iterator[Metric]:
    tiers = {"image": 0, "template": 0, "fresh": 0, **stats.cold_starts}
    yield _counter(
        "coldstarts",
        "Cold starts, by how the workers came to be.",
        ["tier"],
        {(tier,): count for tier, count in tiers.items()},
    )
    yield _gauge(
        "coldstart_stage_seconds",
        "Time that some process spent on a stage of the last cold start; stages overlap.",
        ["stage"],
        {(stage,): seconds for stage, seconds in stats.stages.items()},
    )
    yield _gauge(
        "coldstart_critical_seconds",
        "What the last cold start's first token waited for; adds up to the time to it.",
        ["stage"],
        {(stage,): seconds for stage, seconds in stats.critical.items()},
    )
    yield _gauge("weights_bytes", "The model's weights.", [], {(): stats.weights_bytes})
    yield _counter(
        "weights_loaded_bytes",
        "Bytes of weights loaded, in all cold starts.",
        [],
        {(): stats.bytes_loaded},
    )
    yield _counter(
        "weights_load_seconds", "Time that loads of weights took.", [], {(): stats.load_s}
    )
    yield _counter(
        "zero_seconds", "Time at zero: nothing held but the gateway.", [], {(): stats.zero_s}
    )
    yield _counter(
        "parked_seconds", "Time parked: the weights held, and no more.", [], {(): stats.parked_s}
    )


def _resources(stats: FrontStats) -> Iterator[Metric]:
    free = stats.kv_blocks_total - stats.kv_blocks_used - stats.kv_blocks_cached
    yield _gauge(
        "kv_blocks",
        "KV blocks: those that belong to requests, those kept for others to come, and the rest.",
        ["state"],
        {("used",): stats.kv_blocks_used, ("cached",): stats.kv_blocks_cached, ("free",): free},
    )
    yield _counter(
        "kv_blocks_reused",
        "KV blocks of prompts that were found instead of computed.",
        [],
        {(): stats.kv_blocks_reused},
    )
    yield from _kv_store(stats.kv_store)
    yield _counter(
        "device_seconds",
        "Time that devices were held: used while a request was open, else idle.",
        ["device", "state"],
        {(stats.device, "used"): stats.used_s, (stats.device, "idle"): stats.idle_s},
    )
    yield _gauge(
        "process_memory_bytes",
        "Resident memory by process: its own (anon), shared (shmem) or of files (file).",
        ["process", "kind"],
        {
            (process, kind): count
            for process, kinds in stats.memory.items()
            for kind, count in kinds.items()
        },
    )


def _kv_store(counts: Mapping[str, int]) -> Iterator[Metric]:
    tiers = ("memory", "disk")
    yield _counter(
        "kv_store_stored_blocks",
        "KV blocks that went to the store, by tier.",
        ["tier"],
        {(tier,): counts.get(f"{tier}_stored", 0) for tier in tiers},
    )
    yield _counter(
        "kv_store_loaded_blocks",
        "KV blocks that came back from the store, by tier.",
        ["tier"],
        {(tier,): counts.get(f"{tier}_loaded", 0) for tier in tiers},
    )
    yield _gauge(
        "kv_store_bytes",
        "What the store holds, by tier; of the disk, what all replicas have there.",
        ["tier"],
        {(tier,): counts.get(f"{tier}_bytes", 0) for tier in tiers},
    )
    yield _counter(
        "kv_store_lost_blocks",
        "KV blocks that the store does not have, and why.",
        ["reason"],
        {(why,): counts.get(why, 0) for why in ("corrupt", "unreadable", "unwritten")},
    )
    yield _counter(
        "kv_store_pauses",
        "How often the store could not be written, so that it waited.",
        [],
        {(): counts.get("pauses", 0)},
    )
    yield _gauge(
        "kv_store_paused",
        "1 while the store cannot be written, else 0.",
        [],
        {(): counts.get("paused", 0)},
    )


_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelNumbers], Histogram]], ...] = (
    (
        "time_to_first_token_seconds",
        "From a request's arrival to its first token, the cold start included.",
        lambda numbers: numbers.first_token,
    ),
    (
        "inter_token_latency_seconds",
        "From one token of a sequence to the next.",
        lambda numbers: numbers.between_tokens,
    ),
    (
        "e2e_request_latency_seconds",
        "From a request's arrival to its last token, where it was answered to the end.",
        lambda numbers: numbers.end_to_end,
    ),
    (
        "request_queue_time_seconds",
        "From a request's arrival until a worker had it.",
        lambda numbers: numbers.queued,
    ),
)


def _gauge(name: str, text: str, labels: list[str], values: _Labels) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric([_text(part) for part in key], value)
    return family


def _counter(name: str, text: str, labels: list[str], values: _Labels) -> CounterMetricFamily:
    """A counter; the format puts `_total` behind its name."""
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric([_text(part) for part in key], value)
    return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """The buckets as the format wants them: cumulative, the last without a bound."""
    bounds = [str(bound) for bound in histogram.bounds]
    return list(zip([*bounds, "+Inf"], accumulate(list(histogram.counts)), strict=True))


def _text(label: str) -> str:
    """A label that can be encoded, whatever it is."""
    return label.encode("utf-8", "replace").decode("utf-8")
