"""Decode steps of few sequences by code that was compiled ahead of time; all others by the model.

The code takes tensors as they are: it looks at neither shapes nor strides. So what it was compiled
for is held against the model before anything is handed to it, and again when the weights lie
elsewhere. Where it does not fit, or fails, steps are the model's from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from coldframe.runtime.engine.batch import Batch, Chunk
from coldframe.runtime.engine.code_shape import LEAST_KEYS, MOST_KEYS, CodeShape
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.traced import layer_tensors, logits_tensors
from coldframe.runtime.engine.weights import Weights
from coldframe.runtime.units import first_line
from coldframe.runtime.worker.tensors import torch_dtypes

__all__ = ["Code", "CompiledSteps", "Runner", "Sized"]


class Runner(Protocol):
    """A compiled function."""

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Calls it."""
        ...


@dataclass(frozen=True, slots=True)
class Sized:
    """Steps of one number of sequences.

    Args:
        sequences: How many; a step of fewer repeats its last one.
        layer: See `TracedLayer`.
        logits: See `TracedLogits`.
        keys: How many keys a step may look at; beyond that eager ones may be faster.
    """

    sequences: int
    layer: Runner
    logits: Runner
    keys: int = MOST_KEYS


@dataclass(frozen=True, slots=True)
class Code:
    """What was compiled for a model.

    Args:
        shape: What it is for.
        sizes: From the smallest to the largest.
        note: For people: how much faster than eager it was when it was made.
    """

    shape: CodeShape
    sizes: tuple[Sized, ...]
    note: str

    def refusal(self, model: Model) -> str | None:
        """Why it is not for a model as it is computed here; None where it is."""
        if model.device.type != "cpu" or model.varlen is not None:
            return "compiled for the CPU's own attention, here it is another one's"
        if model.kv.dtype != torch_dtypes()[self.shape.dtype]:
            return f"compiled for keys in {self.shape.dtype}, here they are {model.kv.dtype}"
        here = CodeShape.of(model.spec, self.shape.vectors, torch.get_num_threads())
        return self.shape.difference(here)


class CompiledSteps:
    """A model's decode steps.

    Args:
        model: The model, all its weights in when the first step is computed.
        code: What was compiled for it.
        tell: Called once, with the reason, where it is of no use, from there on.
    """

    def __init__(self, model: Model, code: Code, tell: Callable[[str], None]) -> None:
        self._model = model
        self._sizes = code.sizes
        dtypes = torch_dtypes()
        self._matrices, self._vectors = dtypes[code.shape.dtype], dtypes[code.shape.vectors]
        self._tell = tell
        self._weights: Weights | None = None
        self._layers: list[list[Tensor]] = []
        self._last: list[Tensor] = []
        why = code.refusal(model)
        if why is not None:
            self._give_up(why)

    @property
    def in_use(self) -> bool:
        """Whether any step is still computed so."""
        return bool(self._sizes)

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits `[S, vocab_size]`, float32, of a step; as `Model.forward` of its batch."""
        model = self._model
        batch = model.batch(chunks)
        size = self._size(batch)
        if size is not None:
            try:
                return self._step(batch, size)
            except RuntimeError as error:
                # What it has written to the KV cache by then is what is now written again.
                self._give_up(first_line(error))
        return model.forward(batch)

    def _size(self, batch: Batch) -> Sized | None:
        """The smallest that has room; None where the step is none for this."""
        count = len(batch.chunks)
        if len(batch.singles) != count:
            return None
        found = next((size for size in self._sizes if size.sequences >= count), None)
        if found is None:
            return None
        for window in self._model.windows:
            if not LEAST_KEYS <= batch.single_reach(window).length <= found.keys:
                return None
        return found if self._bind() else None

    def _bind(self) -> bool:
        """Takes the weights where they lie. Whether they are what the code was compiled for."""
        weights = self._model.weights
        if weights is self._weights:
            return True
        layers = [layer_tensors(layer) for layer in weights.layers]
        last = logits_tensors(weights)
        for tensor in chain(*layers, last):
            expected = self._matrices if tensor.dim() > 1 else self._vectors
            if tensor.dtype != expected or not tensor.is_contiguous():
                self._give_up(f"compiled for weights in {expected}, here one is {tensor.dtype}")
                return False
        kv = self._model.kv
        self._layers = [[kv.layer_rows(index), *layer] for index, layer in enumerate(layers)]
        self._last, self._weights = last, weights
        return True

    @torch.inference_mode()
    def _step(self, batch: Batch, size: Sized) -> Tensor:
        model, spec = self._model, self._model.spec
        x = model.embed(batch)
        cos, sin = model.rope.cos_sin(batch.positions, batch.prompt_lengths, x.dtype)
        rows = model.kv.rows(batch.slots)
        count = len(x)
        # A row that is left over does what the last one does, and writes what that writes.
        pick = torch.tensor([*range(count), *[count - 1] * (size.sequences - count)])
        seen = {window: self._seen(batch, window, pick) for window in model.windows}
        if count < size.sequences:
            x, cos, sin, rows = x[pick], cos[pick], sin[pick], rows[pick]
        shared = [cos, sin, torch.cat((rows, rows + model.kv.block_tokens))]
        for window, weights in zip(spec.windows, self._layers, strict=True):
            (x,) = size.layer.run([x, *shared, *seen[window], *weights])
        (logits,) = size.logits.run([x, *self._last])
        return logits[:count]

    def _seen(self, batch: Batch, window: int | None, pick: Tensor) -> list[Tensor]:
        """What is looked at under a window, and what hides that between; see `TracedLayer`."""
        reach, kv = batch.single_reach(window), self._model.kv
        keys = kv.rows_of(reach.table)[:, : reach.length]
        bias = torch.zeros(keys.shape)
        if reach.mask is not None:
            bias.masked_fill_(~reach.mask.view(keys.shape), -torch.inf)
        keys = keys[pick]
        return [torch.stack((keys, keys + kv.block_tokens)), bias[pick]]

    def _give_up(self, why: str) -> None:
        self._sizes, self._weights, self._layers, self._last = (), None, [], []
        self._tell(why)
