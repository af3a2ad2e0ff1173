"""The smallest batch that saturates the device, found by measuring.

What a batch saves is reading the weights: once for all of its tokens. From some number of them on
the arithmetic takes longer than the reading, and a token takes as long as in any larger batch, in
which the shortest prompt would only wait for the longest. Where that is depends on the device, the
dtype, the model's shape and the number of threads. Only a layer's linear maps are run, without KV
or batch: the rest of it costs as much a token whoever goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu

from coldframe.runtime.engine.device import stopwatch
from coldframe.runtime.engine.linear import linear
from coldframe.runtime.engine.weights import LayerWeights

__all__ = ["SIZES", "Saturation", "SaturationProbe", "saturating"]

SIZES = (16, 32, 64, 128, 256, 512)
"""Tokens in a batch."""
_NEAR = 1.1
"""How much longer than in the best of them a token may take."""
_ROUNDS = 6
"""How often each size is run; the first time makes kernels and does not count."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """What was found.

    Args:
        tokens: In the smallest batch that saturates the device.
        threads: Of the kernels; with others it is another.
    """

    tokens: int
    threads: int

    def to_wire(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "threads": self.threads}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Saturation:
        return cls(data["tokens"], data["threads"])


class SaturationProbe:
    """Takes the times piece by piece, so that it can be left between any two.

    The sizes go in turn, and of the times of one the least counts: whatever else the machine did
    meanwhile, it was not that. They are the processor's, of all threads, for the same reason: on a
    busy machine the clock says more of how long a batch has had no core. A GPU's are those between
    two events on it, the first of which waits for nobody: before it there is nothing left to do.
    """

    def __init__(self) -> None:
        self._due = [size for _ in range(_ROUNDS) for size in SIZES]
        self._seconds: dict[int, float] = {}

    def advance(self, layers: Sequence[LayerWeights]) -> Saturation | None:
        """Runs one batch through one layer.

        Args:
            layers: Their weights are in. They are taken in turn, so that one is not found in the
                processor's caches where there are several.

        Returns:
            What was found, once each size has been run often enough.
        """
        size = self._due.pop(0)
        seconds = _seconds(layers[len(self._due) % len(layers)], size)
        if len(self._due) < (_ROUNDS - 1) * len(SIZES):
            self._seconds[size] = min(seconds, self._seconds.get(size, seconds))
        if self._due:
            return None
        return Saturation(saturating(self._seconds), torch.get_num_threads())


def saturating(seconds: Mapping[int, float]) -> int:
    """The smallest size in which a token takes hardly longer than in the best.

    Args:
        seconds: That a batch takes, all of it, by its tokens.
    """
    each = {size: taken / size for size, taken in seconds.items()}
    enough = min(each.values()) * _NEAR
    return min(size for size, taken in each.items() if taken <= enough)


@torch.inference_mode()
def _seconds(layer: LayerWeights, tokens: int) -> float:
    """Time of the device that the linear maps of a layer take for so many tokens."""
    x = torch.ones(tokens, len(layer.o), dtype=layer.o.dtype, device=layer.o.device)
    elapsed = stopwatch(x.device)
    queries, _, _ = layer.qkv(x)
    x = x + linear(queries, layer.o, layer.o_bias)
    gate, up = layer.gate_up(x)
    linear(silu(gate) * up, layer.down, layer.down_bias)
    return elapsed()
