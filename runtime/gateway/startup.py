"""What `GET /startup` says: how far the replica is, and the timeline of its last cold start.

    {
      "state": "zero" | "starting" | "ready" | "parked" | "draining" | "failed",
      "model": as clients call it,
      "stage": what the first token waits for, or null once it is out,
      "bytes_done": 1024, "bytes_total": 4096 (0 while not known),
      "rate": bytes a second, or null,
      "eta_s": seconds until the weights are in, or null,
      "tier": "image" | "template" | "fresh" | null,
      "no_clone": why workers are none of a better tier, or null,
      "load_mode": "mapped" | "copied" | null, what was made of the weights, and
      "load_mode_reason": where they came from, and why so, or null,
      "device": "cpu" | "cuda:N" | "cuda:N, cuda:M", where it computes, or null at zero,
      "device_why": why there, where nobody has named it, or null,
      "contexts": of the workers, while parked on a GPU: {"away": 2, "of": 2, "bytes" they took,
        "seconds" that it took, "why" they stay, or null}; else null,
      "decode": {"engine": "native" | "vllm", which decodes now, "why" not vLLM, or null, its
        "tier": "image" | "fresh" | null, "no_clone": why it is none, or null}, where vLLM is to;
        else, and at zero, null,
      "error": {"error", "what", "where", "expected", "got", "hint"} or null,
      "failures": how many replicas have died, one soon after the other,
      "queue": {"running": 0, "waiting": 3},
      "timeline": the document of `coldframe.runtime.timeline.timeline.Timeline.to_json`, or null,
      "latest": {"stages" of the latest requests behind the start, in seconds from "began_ns" on,
        which is CLOCK_MONOTONIC},
      "policy": {"name", "why": what the schedule follows from, "idle_s": for how long nobody asks,
        "schedule": [[from so many idle seconds on, "zero" | "parked" | "warm"], ...], "next":
        {"in_s", "level"} or null, "most": the level that others leave it, "budget_left_s"},
      "states": {"seconds": {state: seconds}, "cold_starts": starts that somebody has waited for,
        "wakes" from parked, "prewarmed": begun before anybody asked, "prewarmed_used",
        "prewarmed_late", "prewarmed_in_vain"},
      "models": {name: {"state", "open", "failures", "error"}, ...}, where there are several
    }

It is about one model, the first where none is named: `/startup?model=NAME`. The page at `/` shows
it. To ask for it never counts as a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from coldframe.runtime.gateway.loadstate import LoadState

__all__ = ["InShort", "Queue", "Startup", "in_short", "startup_document"]


class Queue(TypedDict):
    """How many sequences are with the workers, and how many wait for them."""

    running: int
    waiting: int


class InShort(TypedDict):
    """A model among others; `error` is what is wrong, in one sentence, or null."""

    state: str
    open: bool
    failures: int
    error: str | None


class Startup(TypedDict):
    """The document; see the module."""

    state: str
    model: str
    stage: str | None
    bytes_done: int
    bytes_total: int
    rate: float | None
    eta_s: float | None
    tier: str | None
    device: str | None
    device_why: str | None
    contexts: Mapping[str, Any] | None
    decode: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    failures: int
    queue: Queue
    timeline: Mapping[str, Any] | None
    latest: NotRequired[Mapping[str, Any] | None]
    no_clone: NotRequired[str | None]
    load_mode: NotRequired[str | None]
    load_mode_reason: NotRequired[str | None]
    policy: NotRequired[Mapping[str, Any] | None]
    states: NotRequired[Mapping[str, Any] | None]
    models: NotRequired[Mapping[str, InShort]]


def in_short(state: LoadState) -> InShort:
    """A model's state without what only its operator should see: a probe shows no key."""
    return {
        "state": state.phase,
        "open": state.open,
        "failures": state.failures,
        "error": None if state.error is None else state.error.get("what"),
    }


def startup_document(
    model: str,
    state: LoadState,
    *,
    running: int,
    waiting: int,
    timeline: Mapping[str, Any] | None,
    decode: Mapping[str, Any] | None = None,
) -> Startup:
    """The document.

    Args:
        model: As clients call it.
        state: What the front said last.
        running: Sequences with the workers.
        waiting: Sequences that wait for them.
        timeline: What the front answered, or None where it did not.
        decode: Likewise, of who decodes.
    """
    loading = state.phase == "starting"
    return {
        "state": state.phase,
        "model": model,
        "stage": state.stage,
        "bytes_done": state.bytes_done,
        "bytes_total": state.bytes_total,
        "rate": state.rate,
        "eta_s": state.eta_s if loading else None,
        "tier": state.tier,
        "device": state.device,
        "device_why": state.device_why,
        "contexts": state.contexts,
        "decode": None if state.phase == "zero" else decode,
        "error": state.error,
        "failures": state.failures,
        "queue": {"running": running, "waiting": waiting},
        "timeline": timeline,
    }
