"""Compiled decode steps against eager ones: the same logits, and how many times as fast."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from statistics import median

import torch
from torch import Tensor

from coldframe.loader.errors import PlatformError
from coldframe.runtime.code_folder import CodeFolder
from coldframe.runtime.code_loading import load_code
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.engine.compiled import CompiledSteps
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.tensors import torch_dtypes

__all__ = ["Trial"]

_PAIRS = 15
_BYTES = 128 << 20
"""Of the weights that are measured with: more than a processor's caches hold."""
_CONTEXTS = (96, 1024)
_DRIFT = {"F32": 1e-4, "F16": 0.01, "BF16": 0.06}
"""How far logits may be from eager's, in parts of the largest of them."""


class Trial:
    """Steps of both kinds, in turns, on weights of a model's shapes.

    Args:
        spec: The model's shape.
        shape: What is compiled.
        most: Sequences in a step.
    """

    def __init__(self, spec: ModelSpec, shape: CodeShape, most: int) -> None:
        dtypes = torch_dtypes()
        dtype = dtypes[spec.dtype]
        nbytes = dtype.itemsize * sum(map(prod, spec.layer_tensors(0).values()))
        count = min(spec.layers, 1 + _BYTES // nbytes)
        spec = replace(spec, layers=count, windows=spec.windows[:count])
        random = torch.Generator().manual_seed(1)
        tensors = {}
        for name, size in spec.expected_tensors().items():
            of = dtypes[shape.vectors] if len(size) == 1 else dtype
            around = 1.0 if name.endswith("norm.weight") else 0.0
            values = torch.randn(size, generator=random).mul_(0.02).add_(around)
            tensors[name] = values.to(of)
        self._contexts = sorted(
            {max(1, min(context, spec.context_length - 2)) for context in _CONTEXTS}
        )
        self._each = -(-(self._contexts[-1] + 1) // BLOCK_TOKENS)
        blocks = self._each * most
        memory = torch.randn(
            blocks * spec.kv_block_bytes(dtype.itemsize, BLOCK_TOKENS) // dtype.itemsize,
            generator=random,
        ).to(dtype)
        self._model = Model(spec, tensors, KVCache(memory, spec, dtype, blocks, BLOCK_TOKENS))

    def ratios(self, folder: CodeFolder, counts: Iterable[int]) -> list[float]:
        """How many times as fast as eager a step is, in each case.

        Args:
            folder: With the code of one size.
            counts: Numbers of sequences to measure it with.

        Raises:
            PlatformError: What it computes is something else.
        """
        why: list[str] = []
        steps = CompiledSteps(self._model, load_code(folder), why.append)
        ratios = []
        for count in sorted(counts):
            for context in self._contexts:
                chunks = list(self._chunks(count, context))
                pairs = []
                for _ in range(_PAIRS):
                    began = time.perf_counter()
                    eager = self._model.forward(self._model.batch(chunks))
                    between = time.perf_counter()
                    compiled = steps.forward(chunks)
                    pairs.append((between - began) / (time.perf_counter() - between))
                    self._compare(eager, compiled)
                ratios.append(median(pairs))
        if why:
            raise PlatformError("the compiled decode step does not run here", got=why[0])
        return ratios

    def _chunks(self, count: int, context: int) -> Iterator[Chunk]:
        for number in range(count):
            blocks = range(number * self._each, (number + 1) * self._each)
            # Not all alike: the longest decides what the others are padded to.
            start = max(1, context - 7 * number)
            yield Chunk((number % self._model.spec.vocab_size,), start, start, blocks)

    def _compare(self, eager: Tensor, compiled: Tensor) -> None:
        apart = float((eager - compiled).abs().max() / eager.abs().max())
        if not apart <= _DRIFT[self._model.spec.dtype]:
            raise PlatformError(
                "the compiled decode step computes something else than eager",
                expected=f"logits within {_DRIFT[self._model.spec.dtype]} of the largest",
                got=f"{apart:.3g}",
            )
