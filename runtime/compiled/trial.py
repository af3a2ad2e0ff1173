"""Compiled decode steps against eager ones: the same logits, and how many times as fast."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from coldframe.loader.errors import PlatformError
from coldframe.runtime.compiled.folder import CodeFolder
from coldframe.runtime.compiled.loading import load_code
from coldframe.runtime.compiled.trial_plan import blocks_of, more_pairs, trial_keys, trial_spec
from coldframe.runtime.engine.batch import Chunk
from coldframe.runtime.engine.code_shape import CodeShape
from coldframe.runtime.engine.compiled import CompiledSteps
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.model import Model
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker.tensors import torch_dtypes

__all__ = ["Trial"]

_CASE_S = 5.0
"""How long one case is measured, in seconds, when it has been three times."""
_LEAST_PAIRS = 3
_SLICE = 1 << 20
"""Numbers that are made at once: in float32, as torch makes good ones in no other."""
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
        spec = trial_spec(spec)
        random = torch.Generator().manual_seed(1)
        tensors = {}
        for name, size in spec.expected_tensors().items():
            of = dtypes[shape.vectors] if len(size) == 1 else dtype
            around = 1.0 if name.endswith("norm.weight") else 0.0
            tensors[name] = _random(size, of, random, around, 0.02)
        self._keys = trial_keys(spec)
        self._each = blocks_of(spec)
        blocks = self._each * most
        count = blocks * spec.kv_block_bytes(dtype.itemsize, BLOCK_TOKENS) // dtype.itemsize
        memory = _random((count,), dtype, random, 0.0, 1.0)
        self._model = Model(spec, tensors, KVCache(memory, spec, dtype, blocks, BLOCK_TOKENS))

    def ratios(self, folder: CodeFolder, counts: Iterable[int]) -> dict[int, list[list[float]]]:
        """How many times as fast as eager a step is, measured several times in each case.

        Args:
            folder: With the code of one size.
            counts: Numbers of sequences to measure it with.

        Returns:
            By the number of keys that are looked at, ascending, for each number of sequences.

        Raises:
            PlatformError: What it computes is something else.
        """
        why: list[str] = []
        steps = CompiledSteps(self._model, load_code(folder), why.append)
        ratios = {
            keys: [self._case(steps, count, keys, pairs) for count in sorted(counts)]
            for keys, pairs in self._keys.items()
        }
        if why:
            raise PlatformError("the compiled decode step does not run here", got=why[0])
        return ratios

    def _case(
        self, steps: CompiledSteps, count: int, keys: int, pairs: tuple[int, int]
    ) -> list[float]:
        chunks = list(self._chunks(count, keys - 1))
        found: list[float] = []
        started = time.perf_counter()
        while more_pairs(found, *pairs):
            began = time.perf_counter()
            if len(found) >= _LEAST_PAIRS and began - started > _CASE_S:
                break
            eager = self._model.forward(self._model.batch(chunks))
            between = time.perf_counter()
            compiled = steps.forward(chunks)
            found.append((between - began) / (time.perf_counter() - between))
            self._compare(eager, compiled)
        return found

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


def _random(
    size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, mean: float, sd: float
) -> Tensor:
    """Random numbers, which take hardly more memory while they are made than afterwards."""
    made = torch.empty(size, dtype=dtype)
    flat = made.view(-1)
    for start in range(0, len(flat), _SLICE):
        part = flat[start : start + _SLICE]
        part.copy_(torch.randn(part.shape, generator=generator).mul_(sd).add_(mean))
    return made
