"""The law of the cold start as arithmetic: what overlaps with what, and what is left to wait for.

Two paths run beside one another. The weights come stage by stage, in the order of use, from the
moment at which the first byte is asked for. The worker comes up meanwhile. From then on each stage
is computed as soon as it is in and the one before it has been computed:

    t = when the worker could begin
    for each stage i:  t = max(t, when stage i is in) + what computing it takes
    TTFT = t + what the first token takes to whoever asked

Where bytes are slow that is their time and the last stage's compute; where they are fast it is the
worker's start and the prefill of all stages. Nothing else is in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CACHES", "Path", "Prediction", "Worker", "predict"]

CACHES = ("cold", "warm")
"""States of the page cache: weights are read or fetched, or they are mapped where they lie."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What a way to start a worker takes, in seconds from the clock's start.

    The clock starts with the exec of the front for a cold start, with the request where the replica
    rests.

    Args:
        first_byte_s: When the first byte of the weights is asked for.
        up_s: When the prefill worker could begin to compute the request.
        embedding_s: What the embedding takes.
        first_layer_s: What the first layer takes, first uses included.
        layer_s: What each further layer takes, with the first touch of its weights.
        head_s: What the final norm, the head and the draw take.
        out_s: What the token takes from there to whoever asked.
    """

    first_byte_s: float
    up_s: float
    embedding_s: float
    first_layer_s: float
    layer_s: float
    head_s: float
    out_s: float


@dataclass(frozen=True, slots=True)
class Path:
    """How the weights come.

    Args:
        rate: Bytes a second; infinite for what is there already.
        latency_s: What passes before the first byte is there.
    """

    rate: float = math.inf
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """The time to the first token, and what there is in it.

    Attributes:
        ttft_s: Seconds.
        parts: `until_first_byte`, `weights` (from the first byte asked for to the last that is in)
            and `worker` (until it can compute) overlap; `prefill` is what computing takes,
            `waits_for_weights` what the worker stands still for them once it is up, and
            `token_out` the rest.
    """

    ttft_s: float
    parts: dict[str, float]


def predict(worker: Worker, path: Path, stages: Sequence[int]) -> Prediction:
    """The time to the first token.

    Args:
        worker: How the worker comes.
        path: How the weights come.
        stages: Bytes of each stage: the embedding, each layer, the head.
    """
    layers = len(stages) - 2
    computes = [
        worker.embedding_s,
        *([worker.first_layer_s, *[worker.layer_s] * (layers - 1)] if layers else []),
        worker.head_s,
    ]
    began = worker.first_byte_s + path.latency_s
    at, done, waited = worker.up_s, 0, 0.0
    for nbytes, takes in zip(stages, computes, strict=True):
        done += nbytes
        ready = began + done / path.rate
        waited += max(0.0, ready - at)
        at = max(at, ready) + takes
    return Prediction(
        at + worker.out_s,
        {
            "until_first_byte": worker.first_byte_s,
            "weights": path.latency_s + done / path.rate,
            "worker": worker.up_s,
            "waits_for_weights": waited,
            "prefill": sum(computes),
            "token_out": worker.out_s,
        },
    )
