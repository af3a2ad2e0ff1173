"""What the front tells the gateway at each scrape: numbers that the gateway cannot know.

Requests and tokens it counts itself (`coldframe.runtime.gateway.metrics`). What is here is gathered
when somebody asks, and costs nothing between two scrapes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any, Literal

from coldframe.runtime.timeline.timeline import Timeline

__all__ = [
    "SHARED_PROCESSES",
    "BusyClock",
    "DeviceState",
    "FrontStats",
    "critical_seconds",
    "resident",
    "stage_seconds",
]

DeviceState = Literal["zero", "parked", "idle", "used"]
_STATES: tuple[DeviceState, ...] = ("zero", "parked", "idle", "used")
SHARED_PROCESSES = ("front", "gateway")
"""The names of those that serve all models."""


@dataclass(frozen=True, slots=True)
class FrontStats:
    """The front's numbers, all in bytes, blocks and seconds.

    Args:
        kv_blocks_used: Blocks that belong to requests.
        kv_blocks_cached: Blocks that belong to none, and are kept for requests that begin alike.
        kv_blocks_total: Blocks that there are; 0 before the KV is sized and at zero.
        kv_blocks_reused: Blocks of prompts that were found instead of computed, so far.
        prefill_tokens_waiting: Prompt tokens of requests that prefill has not done with.
        prefilled_by_decode: Requests the rest of whose prompt a decode worker was given, so far.
        prefill_batch_tokens: In the smallest batch that saturates the device; 0 before that is
            measured.
        kv_store: What the KV store has counted so far, and how much there is in it now; see
            `coldframe.loader.kv.tally.StoreUsage`.
        kv_tickets: What has become of requests with a ticket for KV in another replica; see
            `coldframe.loader.transport.usage.TakeUsage`.
        weights_bytes: Bytes of the model's weights.
        bytes_loaded: Bytes of weights that were loaded so far, in all cold starts.
        load_s: Seconds from the start of a load to its last byte, summed over the loads.
        cold_starts: How many there were, by tier: `image`, `template`, `fresh`.
        stages: The last cold start's stages; see `stage_seconds`.
        critical: What its first token waited for; see `critical_seconds`.
        zero_s: Seconds in which nothing was held but the gateway.
        parked_s: Seconds in which the weights were held, and no more.
        device_s: By device, `cpu` or `cuda:N`: device seconds while a request was open (`used`),
            and while it was held and none was (`idle`).
        device_faults: How often a GPU was `lost`, and how often the CPU has stood in for one that
            could not be used (`fallback`).
        workers: By role: how many start (`starting`), are `up`, and are to go (`leaving`).
        vllm_events: How often a vLLM engine took decode over (`takeover`), never came up
            (`failed_start`), and `died` while it decoded, beside native workers; and how often one
            that came up was a `clone`.
        prewarms: How often it was started or warmed before anybody asked (`begun`), and how often
            somebody came when it was there (`used`), on its way (`late`), or nobody did (`vain`).
        contexts_away_bytes: What the workers' contexts took of a GPU that they have left for now.
        memory: By process: resident bytes by kind; see `resident`. Those of `SHARED_PROCESSES` are
            told with one model only.
    """

    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_total: int = 0
    kv_blocks_reused: int = 0
    prefill_tokens_waiting: int = 0
    prefilled_by_decode: int = 0
    prefill_batch_tokens: int = 0
    kv_store: Mapping[str, int] = field(default_factory=dict)
    kv_tickets: Mapping[str, int] = field(default_factory=dict)
    weights_bytes: int = 0
    bytes_loaded: int = 0
    load_s: float = 0.0
    cold_starts: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)
    critical: Mapping[str, float] = field(default_factory=dict)
    zero_s: float = 0.0
    parked_s: float = 0.0
    device_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    device_faults: Mapping[str, int] = field(default_factory=dict)
    workers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    vllm_events: Mapping[str, int] = field(default_factory=dict)
    prewarms: Mapping[str, int] = field(default_factory=dict)
    contexts_away_bytes: int = 0
    memory: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """The numbers as JSON values."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @staticmethod
    def from_wire(data: Mapping[str, Any]) -> FrontStats:
        return FrontStats(**data)


def stage_seconds(timeline: Timeline) -> dict[str, float]:
    """How long each stage of a start took: the time in which some process was at it.

    Stages with an index count as one (`prefill[3]` as `prefill`), and waits do not count. Stages
    run beside one another, so that these seconds add up to more than the start took.

    Args:
        timeline: Of the start; of it, what happened up to the first token, where there was one.
    """
    end = timeline.first_token_ns
    spans = [s for s in timeline.spans if s.waits_for is None and (end is None or s.start_ns < end)]
    spans.sort(key=lambda span: (_stage(span.name), span.start_ns))
    seconds = {}
    for stage, group in groupby(spans, key=lambda span: _stage(span.name)):
        covered_ns, reached = 0, 0
        for span in group:
            stop = span.end_ns if end is None else min(span.end_ns, end)
            covered_ns += max(0, stop - max(span.start_ns, reached))
            reached = max(reached, stop)
        seconds[stage] = covered_ns / 1e9
    return seconds


def critical_seconds(timeline: Timeline) -> dict[str, float]:
    """What the first token waited for, by stage; these seconds add up to the time to it."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for step in timeline.critical_path():
        seconds[_stage(step.name)] += step.seconds
    return dict(seconds)


def _stage(name: str) -> str:
    return name.partition("[")[0]


def resident(pid: int) -> dict[str, int]:
    """A process's resident bytes: `anon` is its own, `shmem` the arenas, `file` programs and files.

    A share of what several processes have mapped (PSS) would be one number instead of three, but
    to get it the kernel walks every page of the arenas: 3 ms a gigabyte, in each process.

    Returns:
        Nothing where the process is gone.
    """
    found = {}
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in ("RssAnon", "RssFile", "RssShmem"):
                    found[name.removeprefix("Rss").lower()] = int(rest.split()[0]) * 1024
    except OSError:
        return {}
    return found


class BusyClock:
    """How long a device was used, idle, and not held at all.

    A device is used while a request is open: from outside, more cannot be known of a worker, and
    whoever pays for the device pays for a request that waits for weights, too.

    Args:
        clock: Monotonic seconds.
        devices: Those that go from one state to the next together, until `enter` says otherwise.
    """

    def __init__(self, clock: Callable[[], float], devices: tuple[str, ...] = ("cpu",)) -> None:
        self._clock = clock
        self._state: DeviceState = "zero"
        self._since = clock()
        self._devices = devices
        self._passed: dict[DeviceState, float] = dict.fromkeys(_STATES, 0.0)
        self._seconds: dict[str, dict[DeviceState, float]] = {}
        self._count(0.0)

    @property
    def state(self) -> DeviceState:
        return self._state

    def enter(self, state: DeviceState, devices: tuple[str, ...] = ()) -> None:
        """The devices are in that state from now on; they may be in it already.

        Args:
            state: Which.
            devices: Which devices; none for the same as before.
        """
        devices = devices or self._devices
        if (state, devices) != (self._state, self._devices):
            self._settle()
            self._state, self._devices = state, devices

    @property
    def zero_s(self) -> float:
        """Seconds at zero, of the clock: no device is held then."""
        self._settle()
        return self._passed["zero"]

    @property
    def parked_s(self) -> float:
        """Seconds parked, of the clock."""
        self._settle()
        return self._passed["parked"]

    @property
    def idle_s(self) -> float:
        """Device seconds."""
        return self._total("idle")

    @property
    def used_s(self) -> float:
        """Device seconds."""
        return self._total("used")

    @property
    def by_device(self) -> dict[str, dict[str, float]]:
        """Device seconds `used` and `idle`, of each device that was one."""
        self._settle()
        return {
            device: {state: seconds[state] for state in ("used", "idle")}
            for device, seconds in self._seconds.items()
        }

    def _total(self, state: DeviceState) -> float:
        self._settle()
        return sum(seconds[state] for seconds in self._seconds.values())

    def _count(self, seconds: float) -> None:
        self._passed[self._state] += seconds
        for device in self._devices:
            self._seconds.setdefault(device, dict.fromkeys(_STATES, 0.0))[self._state] += seconds

    def _settle(self) -> None:
        now = self._clock()
        self._count(now - self._since)
        self._since = now
