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

from coldframe.runtime.endpoint.frontstats import SHARED_PROCESSES, FrontStats
from coldframe.runtime.gateway.metrics import Histogram, Metrics, ModelNumbers

__all__ = ["PREFIX", "render"]

PREFIX = "coldframe_"
_OPENMETRICS = "application/openmetrics-text"
_TIERS = ("image", "template", "fresh")
_FAULTS = ("lost", "fallback")
_PREWARMS = ("begun", "used", "late", "vain")
_VLLM = ("takeover", "failed_start", "died", "clone")
_OUTCOMES = ("taken", "lost")

_Labels = Mapping[tuple[str, ...], float]


def render(metrics: Metrics, stats: Mapping[str, FrontStats], accept: str) -> tuple[bytes, str]:
    """See `Metrics.render`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(metrics, stats))
    # Versions and escapings of the client's are not taken over: they would go into our header.
    encode, content_type = choose_encoder(_OPENMETRICS if _OPENMETRICS in accept else "")
    return encode(registry), content_type


class _Families(Collector):
    """One scrape's families."""

    def __init__(self, metrics: Metrics, stats: Mapping[str, FrontStats]) -> None:
        self._metrics = metrics
        self._stats = stats
        # The loop may add a model while this runs in a thread; a list is taken in one go.
        self._models = list(metrics.models.items())

    def describe(self) -> Iterable[Metric]:
        return ()  # one collector, and names that a test checks

    def collect(self) -> Iterator[Metric]:
        yield from self._latencies()
        yield from self._requests()
        if self._stats:
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
        # Whom nobody has asked yet has none: without a number autoscalers would keep the pod.
        unasked: dict[tuple[str, ...], float] = {(model,): 0 for model in self._stats}
        yield _gauge(
            "num_requests_running",
            "Requests that a worker has.",
            ["model"],
            {**unasked, **{(model,): numbers.running for model, numbers in models}},
        )
        yield _gauge(
            "num_requests_waiting",
            "Requests that wait for a worker, also while there is none.",
            ["model"],
            {**unasked, **{(model,): numbers.waiting for model, numbers in models}},
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


def _cold_starts(stats: Mapping[str, FrontStats]) -> Iterator[Metric]:
    yield _counter(
        "coldstarts",
        "Cold starts, by how the workers came to be.",
        ["model", "tier"],
        _each(stats, lambda told: {**dict.fromkeys(_TIERS, 0), **told.cold_starts}),
    )
    yield _gauge(
        "coldstart_stage_seconds",
        "Time that some process spent on a stage of the last cold start; stages overlap.",
        ["model", "stage"],
        _each(stats, lambda told: told.stages),
    )
    yield _gauge(
        "coldstart_critical_seconds",
        "What the last cold start's first token waited for; adds up to the time to it.",
        ["model", "stage"],
        _each(stats, lambda told: told.critical),
    )
    yield _gauge(
        "weights_bytes",
        "The model's weights.",
        ["model"],
        {(model,): told.weights_bytes for model, told in stats.items()},
    )
    yield _counter(
        "weights_loaded_bytes",
        "Bytes of weights loaded, in all cold starts.",
        ["model"],
        {(model,): told.bytes_loaded for model, told in stats.items()},
    )
    yield _counter(
        "weights_load_seconds",
        "Time that loads of weights took.",
        ["model"],
        {(model,): told.load_s for model, told in stats.items()},
    )
    yield _counter(
        "zero_seconds",
        "Time at zero: nothing of the model held.",
        ["model"],
        {(model,): told.zero_s for model, told in stats.items()},
    )
    yield _counter(
        "parked_seconds",
        "Time parked: the weights held, and no more.",
        ["model"],
        {(model,): told.parked_s for model, told in stats.items()},
    )
    yield _counter(
        "prewarms",
        "How often it was started or warmed before anybody asked (begun), and how often somebody "
        "then came when it was there (used), while it was on its way (late), or nobody did (vain).",
        ["model", "event"],
        _each(stats, lambda told: {event: told.prewarms.get(event, 0) for event in _PREWARMS}),
    )
    yield _gauge(
        "contexts_away_bytes",
        "What the workers' contexts took of a GPU that they have left while parked.",
        ["model"],
        {(model,): told.contexts_away_bytes for model, told in stats.items()},
    )


def _resources(stats: Mapping[str, FrontStats]) -> Iterator[Metric]:
    yield _gauge(
        "kv_blocks",
        "KV blocks: those that belong to requests, those kept for others to come, and the rest.",
        ["model", "state"],
        _each(stats, _kv_blocks),
    )
    yield _counter(
        "kv_blocks_reused",
        "KV blocks of prompts that were found instead of computed.",
        ["model"],
        {(model,): told.kv_blocks_reused for model, told in stats.items()},
    )
    yield _gauge(
        "prefill_tokens_waiting",
        "Prompt tokens that are still to be computed, of the requests that the workers were given.",
        ["model"],
        {(model,): told.prefill_tokens_waiting for model, told in stats.items()},
    )
    yield _counter(
        "requests_prefilled_by_decode",
        "Requests the rest of whose prompt was left to a decode worker.",
        ["model"],
        {(model,): told.prefilled_by_decode for model, told in stats.items()},
    )
    yield _gauge(
        "prefill_batch_tokens",
        "Tokens in the smallest batch that saturates the device; 0 before that is measured.",
        ["model"],
        {(model,): told.prefill_batch_tokens for model, told in stats.items()},
    )
    yield from _kv_store(stats)
    yield _counter(
        "kv_tickets",
        "Requests with a ticket for KV in another replica: it was taken, or was lost.",
        ["model", "outcome"],
        _each(stats, _tickets),
    )
    yield _counter(
        "kv_taken_bytes",
        "KV that was taken from other replicas.",
        ["model"],
        {
            (model,): told.kv_tickets.get("kv_ticket_taken_bytes", 0)
            for model, told in stats.items()
        },
    )
    yield _counter(
        "device_seconds",
        "Time that devices were held: used while a request was open, else idle.",
        ["model", "device", "state"],
        {
            (model, device, state): seconds
            for model, told in stats.items()
            for device, states in told.device_s.items()
            for state, seconds in states.items()
        },
    )
    yield _counter(
        "device_faults",
        "How often a GPU was lost, and how often the CPU has stood in for one (fallback).",
        ["model", "kind"],
        _each(stats, lambda told: {kind: told.device_faults.get(kind, 0) for kind in _FAULTS}),
    )
    yield _gauge(
        "workers",
        "Workers by role, and whether they start, are up, or are to go (leaving).",
        ["model", "role", "state"],
        {
            (model, role, state): count
            for model, told in stats.items()
            for role, states in told.workers.items()
            for state, count in states.items()
        },
    )
    yield _counter(
        "vllm_events",
        "How often vLLM took decode over from native workers, did not come up, died, and was a "
        "clone when it came up.",
        ["model", "event"],
        _each(stats, lambda told: {event: told.vllm_events.get(event, 0) for event in _VLLM}),
    )
    yield _gauge(
        "process_memory_bytes",
        "Resident memory by process: its own (anon), shared (shmem) or of files (file); those of "
        "no model serve all of them.",
        ["model", "process", "kind"],
        {
            ("" if process in SHARED_PROCESSES else model, process, kind): count
            for model, told in stats.items()
            for process, kinds in told.memory.items()
            for kind, count in kinds.items()
        },
    )


def _each(
    stats: Mapping[str, FrontStats], pick: Callable[[FrontStats], Mapping[str, float]]
) -> _Labels:
    """Each model's values by one more label."""
    return {
        (model, key): value for model, told in stats.items() for key, value in pick(told).items()
    }


def _tickets(told: FrontStats) -> Mapping[str, float]:
    return {name: told.kv_tickets.get(f"kv_ticket_{name}", 0) for name in _OUTCOMES}


def _kv_blocks(told: FrontStats) -> Mapping[str, float]:
    used, cached = told.kv_blocks_used, told.kv_blocks_cached
    return {"used": used, "cached": cached, "free": told.kv_blocks_total - used - cached}


def _kv_store(stats: Mapping[str, FrontStats]) -> Iterator[Metric]:
    tiers, reasons = ("memory", "disk"), ("corrupt", "unreadable", "unwritten")
    yield _counter(
        "kv_store_stored_blocks",
        "KV blocks that went to the store, by tier.",
        ["model", "tier"],
        _each(stats, lambda told: {tier: told.kv_store.get(f"{tier}_stored", 0) for tier in tiers}),
    )
    yield _counter(
        "kv_store_loaded_blocks",
        "KV blocks that came back from the store, by tier.",
        ["model", "tier"],
        _each(stats, lambda told: {tier: told.kv_store.get(f"{tier}_loaded", 0) for tier in tiers}),
    )
    yield _gauge(
        "kv_store_bytes",
        "What the store holds, by tier; of the disk, what all replicas have there.",
        ["model", "tier"],
        _each(stats, lambda told: {tier: told.kv_store.get(f"{tier}_bytes", 0) for tier in tiers}),
    )
    yield _counter(
        "kv_store_lost_blocks",
        "KV blocks that the store does not have, and why.",
        ["model", "reason"],
        _each(stats, lambda told: {why: told.kv_store.get(why, 0) for why in reasons}),
    )
    yield _counter(
        "kv_store_pauses",
        "How often the store could not be written, so that it waited.",
        ["model"],
        {(model,): told.kv_store.get("pauses", 0) for model, told in stats.items()},
    )
    yield _gauge(
        "kv_store_paused",
        "1 while the store cannot be written, else 0.",
        ["model"],
        {(model,): told.kv_store.get("paused", 0) for model, told in stats.items()},
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
