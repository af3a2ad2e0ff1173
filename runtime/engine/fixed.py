"""A model's decode steps over memory that does not move: what is captured, and what checks it.

A captured step knows the addresses of the weights, of the KV, and of what is kept here: a place for
the step's numbers, one for its logits, and copies of what positions are turned with. All buckets
use the same places. What a step computes in is the capturer's to find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.buckets import Bucket, largest
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.padded import PaddedStep

__all__ = ["FixedSteps"]

_GATHERED = 256 << 20
"""Bytes of keys and values that a step may copy in a layer, where no kernel reads them where they
lie: those of the whole bucket, however long its sequences are."""


class FixedSteps:
    """The padded steps of a model.

    Args:
        model: The model, with the kernel that it attends by.
        most: Sequences in the largest step.
    """

    def __init__(self, model: Model, most: int) -> None:
        self._model = model
        self._most = most
        self._steps: dict[Bucket, PaddedStep] = {}
        self._numbers = self._logits = torch.empty(0)
        self.placed = False

    @property
    def context_blocks(self) -> int:
        """KV blocks of the longest sequence."""
        return -(-self._model.spec.context_length // self._model.kv.block_tokens)

    @torch.inference_mode()
    def place(self, memory: Callable[[int], Tensor]) -> None:
        """Has all that steps share lie where it stays.

        Args:
            memory: Gives so many bytes, `[n]` uint8. It is asked for pieces whose sizes and order
                depend on the model and on `most` alone: they lie alike in every process.

        Raises:
            DeviceError: There is none.
        """

        def copied(tensor: Tensor) -> Tensor:
            there = memory(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
            return there.copy_(tensor)

        self._model.rope.move(copied)
        numbers = largest(self._most, self.context_blocks).numbers
        self._numbers = memory(8 * numbers).view(torch.int64)
        shape = (self._most, self._model.spec.vocab_size)
        self._logits = memory(4 * shape[0] * shape[1]).view(torch.float32).view(shape)
        self.placed = True

    def fill(self, bucket: Bucket, chunks: Sequence[Chunk]) -> None:
        """Says what the next step of a bucket is; see `PaddedStep.fill`."""
        self._model.kv.clear(self._step(bucket).fill(chunks))

    @torch.inference_mode()
    def run(self, bucket: Bucket, model: Model | None = None) -> None:
        """Does the step, kernel by kernel.

        Args:
            bucket: Which step.
            model: Over another cache than the model's own; its weights are the same.
        """
        model = model or self._model
        logits = model.forward(self._step(bucket).batch())
        self._logits[: bucket.sequences].copy_(logits)

    def logits(self, count: int) -> Tensor:
        """What the last step has made for its first sequences, `[count, vocab_size]` float32."""
        return self._logits[:count]

    def forget(self, chunks: Sequence[Chunk]) -> None:
        """Wipes what the last step has made: keys, values and logits."""
        unit, kv = self._model.kv.block_tokens, self._model.kv
        for chunk in chunks:
            kv.forget(chunk.blocks[chunk.start // unit], chunk.start % unit)
        self._logits.fill_(torch.nan)

    def warm_up(self, bucket: Bucket) -> None:
        """Does a step for nobody, over a KV block of its own."""
        kv, spec = self._model.kv, self._model.spec
        nbytes = spec.kv_block_bytes(kv.dtype.itemsize, kv.block_tokens)
        memory = torch.zeros(nbytes, dtype=torch.uint8, device=kv.device)
        self._step(bucket).fill_for_nobody()
        self.run(bucket, self._model.over(KVCache(memory, spec, kv.dtype, 1, kv.block_tokens)))
        self._model.settle()

    def fits(self, bucket: Bucket) -> bool:
        """Whether a step copies no more keys and values than it may."""
        model = self._model
        if model.varlen is not None and model.varlen.way.paged:
            return True
        blocks = bucket.sequences * bucket.blocks
        nbytes = model.spec.kv_block_bytes(model.kv.dtype.itemsize, model.kv.block_tokens)
        return blocks * nbytes // model.spec.layers <= _GATHERED

    def _step(self, bucket: Bucket) -> PaddedStep:
        if bucket not in self._steps:
            self._steps[bucket] = PaddedStep(
                bucket,
                self._numbers,
                block_tokens=self._model.kv.block_tokens,
                windows=self._model.windows,
                ragged=self._model.varlen is not None,
            )
        return self._steps[bucket]
