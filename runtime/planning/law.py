"""The law of the cold start as arithmetic: what overlaps with what, and what is left to wait for.

Two paths run beside one another. The weights come stage by stage, in the order of use, from the
moment at which the first byte is asked for. The worker comes up meanwhile. From then on each stage
is computed as soon as it is in and the one before it has been computed:

    t = when the worker could begin
    for each stage i:  t = max(t, when stage i is in) + what computing it takes
    TTFT = t + what the first token takes to whoever asked

Where bytes are slow that is their time and the last stage's compute; where they are fast it is the
worker's start and the prefill of all stages.

Beside one another they are as far as there are processors for both. A byte takes processor time on
its way, and where others are busy on all processors that is missing there: what a stream takes
beyond that of the start which was measured, less what was idle in it, is divided among them, and
comes on top of the worker's start; a stage that is computed meanwhile has the less of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["CACHES", "Path", "Prediction", "Worker", "predict"]

CACHES = ("cold", "warm")
"""States of the page cache: weights are read or fetched, or they are mapped where they lie."""
_MOST_SHARE = 0.5
"""Of the processors, what a stream has at most beside a stage that is computed on all of them."""
_ROUNDS = 100
_CLOSE_S = 1e-6


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
        busy: Processors that were busy meanwhile, in the mean: with the replica, or with others.
        stream_s: Processor time that a byte of the weights takes on its way from the disk.
        streamed: Bytes that had come by then.
    """

    first_byte_s: float
    up_s: float
    embedding_s: float
    first_layer_s: float
    layer_s: float
    head_s: float
    out_s: float
    busy: float = 0.0
    stream_s: float = 0.0
    streamed: float = 0.0


@dataclass(frozen=True, slots=True)
class Path:
    """How the weights come.

    Args:
        rate: Bytes a second; infinite for what is there already.
        latency_s: What passes before the first byte is there.
        stream_s: Processor time that a byte takes on that way; None for as much as the worker's.
    """

    rate: float = math.inf
    latency_s: float = 0.0
    stream_s: float | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """The time to the first token, and what there is in it.

    Attributes:
        ttft_s: Seconds.
        parts: `until_first_byte`, `weights` (from the first byte asked for to the last that is in)
            and `worker` (until it can compute) overlap; `prefill` is what computing takes,
            `waits_for_weights` what the worker stands still for them once it is up, `token_out`
            the rest. `processors` is what of `worker` and `prefill` is the stream's doing.
    """

    ttft_s: float
    parts: dict[str, float]


def predict(
    worker: Worker,
    path: Path,
    stages: Sequence[int],
    processors: float = math.inf,
    *,
    computes_there: bool = True,
) -> Prediction:
    """The time to the first token.

    Args:
        worker: How the worker comes.
        path: How the weights come.
        stages: Bytes of each stage: the embedding, each layer, the head.
        processors: How many there are for all of the replica's processes.
        computes_there: Whether stages are computed on these, and on all of them.
    """
    layers = len(stages) - 2
    computes = [
        worker.embedding_s,
        *([worker.first_layer_s, *[worker.layer_s] * (layers - 1)] if layers else []),
        worker.head_s,
    ]
    began, total = worker.first_byte_s + path.latency_s, sum(stages)
    stream = _Stream(worker, path, began, total, processors)
    at, done, waited, computed = stream.up_s, 0, 0.0, 0.0
    for nbytes, takes in zip(stages, computes, strict=True):
        done += nbytes
        ready = began + done / path.rate
        waited += max(0.0, ready - at)
        at = max(at, ready)
        took = stream.beside(at, takes) if computes_there else takes
        at, computed = at + took, computed + took
    return Prediction(
        at + worker.out_s,
        {
            "until_first_byte": worker.first_byte_s,
            "weights": path.latency_s + total / path.rate,
            "worker": stream.up_s,
            "waits_for_weights": waited,
            "prefill": computed,
            "token_out": worker.out_s,
            "processors": stream.up_s - worker.up_s + computed - sum(computes),
        },
    )


class _Stream:
    """What weights on their way take of the processors.

    Args:
        worker: See `predict`, as all of these.
        path: How they come.
        began: When the first byte was there.
        total: Bytes of all.
        processors: How many there are.
    """

    def __init__(
        self, worker: Worker, path: Path, began: float, total: int, processors: float
    ) -> None:
        self._ends = began + total / path.rate
        self._share = 0.0
        self.up_s = worker.up_s
        """When the worker could begin to compute beside it."""
        if path.rate == math.inf or processors == math.inf:
            return
        each_s = worker.stream_s if path.stream_s is None else path.stream_s
        self._share = min(_MOST_SHARE, each_s * path.rate / processors)
        # What was measured had some of it already, and may have left some processors idle.
        there = worker.stream_s * worker.streamed
        there += max(0.0, processors - worker.busy) * worker.up_s
        for _ in range(_ROUNDS):
            came = min(total, max(0.0, self.up_s - began) * path.rate)
            then = worker.up_s + max(0.0, each_s * came - there) / processors
            if then - self.up_s < _CLOSE_S:
                return
            self.up_s = then  # and more have come by then

    def beside(self, at: float, takes: float) -> float:
        """How long a stage takes that is computed from a moment on."""
        together = max(0.0, self._ends - at)
        alone = 1 - self._share
        return takes / alone if takes <= together * alone else takes + together * self._share
