"""What `GET /startup` says: how far the replica is, and the timeline of its last cold start.

    {
      "state": "zero" | "starting" | "ready" | "parked" | "draining" | "failed",
      "model": as clients call it,
      "stage": what the first token waits for, or null once it is out,
      "bytes_done": 1024, "bytes_total": 4096 (0 while not known),
      "rate": bytes a second, or null,
      "eta_s": seconds until the weights are in, or null,
      "tier": "image" | "template" | "fresh" | null,
      "error": {"error", "what", "where", "expected", "got", "hint"} or null,
      "failures": how many replicas have died, one soon after the other,
      "queue": {"running": 0, "waiting": 3},
      "timeline": the document of `coldframe.runtime.timeline.Timeline.to_json`, or null
    }

The page at `/` shows it. To ask for it never counts as a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from coldframe.runtime.gateway.loadstate import LoadState

__all__ = ["Queue", "Startup", "startup_document"]


class Queue(TypedDict):
    """How many sequences are with the workers, and how many wait for them."""

    running: int
    waiting: int


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
    error: Mapping[str, Any] | None
    failures: int
    queue: Queue
    timeline: Mapping[str, Any] | None


def startup_document(
    model: str,
    state: LoadState,
    *,
    running: int,
    waiting: int,
    timeline: Mapping[str, Any] | None,
) -> Startup:
    """The document.

    Args:
        model: As clients call it.
        state: What the front said last.
        running: Sequences with the workers.
        waiting: Sequences that wait for them.
        timeline: What the front answered, or None where it did not.
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
        "error": state.error,
        "failures": state.failures,
        "queue": {"running": running, "waiting": waiting},
        "timeline": timeline,
    }
