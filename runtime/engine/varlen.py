"""Attention of a whole ragged batch in one call, where torch has a kernel for it on this device.

That is `torch.nn.attention.varlen`, in one of two ways: *paged*, which reads keys and values in
their blocks by a table, or *gathered*, which wants each sequence's in one run. Whether this torch
has either for this device, dtype and shape of the KV cache, whose blocks are a page stride apart,
is not concluded from versions: `find` looks at the function's parameters, calls it once on the
device, and holds what comes out against what `attention.attend` computes. Where nothing agrees
with that, `attend` it is.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coldframe.loader.errors import DeviceLost
from coldframe.runtime.engine.attention import attend
from coldframe.runtime.engine.batch import Batch, Chunk
from coldframe.runtime.engine.device_errors import as_device_error
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.spec import ModelSpec

__all__ = ["Varlen", "find"]

_NEEDED = {"window_size", "seqused_k"}
_NEEDED_FOR_PAGES = {"block_table", "num_splits"}
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Relative and absolute: two roundings of the result."""
_MIXED = ((0, 70), (0, 1), (40, 1), (33, 50), (95, 1), (0, 33))
_ALONE = ((0, 70), (0, 1), (0, 33))
"""Sequences to compare with: how many tokens there are before the batch, and how many in it."""
_WINDOW = 20
"""To compare under, where the model has windows."""


class Varlen:
    """A kernel for ragged batches, and how it is called.

    Args:
        function: `torch.nn.attention.varlen.varlen_attn`, or what has its parameters.
        paged: Whether it reads keys and values where they lie.
    """

    def __init__(self, function: Callable[..., Tensor], *, paged: bool) -> None:
        self.paged = paged
        self._function = function
        known = inspect.signature(function).parameters
        # In one split, an answer does not depend on who else is in the batch. Left to itself the
        # kernel for pages has also made NaN of some (pytorch/pytorch#179760).
        always = {"enable_gqa": True, "num_splits": 1}
        self._options = {name: value for name, value in always.items() if name in known}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        kv: KVCache,
        layer: int,
        window: int | None,
    ) -> Tensor:
        """Attention as `attend` does it, of a batch that was built with `ragged`."""
        ragged = batch.ragged
        assert ragged is not None
        options: dict[str, Any] = dict(self._options)
        starts: Tensor | None = ragged.starts
        if self.paged:
            keys, values = kv.layer_pages(layer)
            starts, options["block_table"] = None, ragged.table
        elif ragged.alone:
            keys, values = k, v
        else:
            keys, values = kv.run(layer, ragged.blocks)
            starts = ragged.block_starts
        return self._function(
            q,
            keys,
            values,
            ragged.starts,
            starts,
            ragged.longest,
            ragged.furthest,
            window_size=(-1 if window is None else window - 1, 0),
            seqused_k=ragged.lengths,
            **options,
        )


def find(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_tokens: int = 32,
    function: Callable[..., Tensor] | None = None,
) -> Varlen | None:
    """The way to call the kernel that works here.

    Args:
        spec: The model's shape.
        dtype: Of keys and values.
        device: Where they are.
        block_tokens: Tokens in a KV block.
        function: See `Varlen`; None takes torch's, where it has one.

    Returns:
        None where there is none that computes what `attend` computes.

    Raises:
        DeviceLost: The device did not survive the trial.
    """
    if function is None:
        try:
            function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except (ImportError, AttributeError):
            return None
    known = set(inspect.signature(function).parameters)
    if not known >= _NEEDED:
        return None
    ways = (True, False) if known >= _NEEDED_FOR_PAGES else (False,)
    trial = _Trial(spec, dtype, device, block_tokens)
    found = (Varlen(function, paged=paged) for paged in ways)
    return next((varlen for varlen in found if trial.agrees(varlen)), None)


class _Trial:
    """Batches of all kinds of sequences, over a cache of noise."""

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, block_tokens: int
    ) -> None:
        self._spec = replace(spec, layers=2, windows=(None, None))
        self._device = device
        # Of the model's windows each kind, so small that it bites.
        self._windows = {None if window is None else _WINDOW for window in spec.windows}
        self._noise = torch.Generator(device).manual_seed(1)
        width = max(-(-(start + count) // block_tokens) for start, count in _MIXED)
        blocks = len(_MIXED) * width
        size = blocks * self._spec.kv_block_bytes(dtype.itemsize, block_tokens)
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._kv = KVCache(memory, self._spec, dtype, blocks, block_tokens)
        self._kv.pages.normal_(generator=self._noise)

    def agrees(self, varlen: Varlen) -> bool:
        """Whether it computes what `attend` does."""
        try:
            return all(self._agrees(varlen, batch) for batch in (_MIXED, _ALONE))
        except Exception as error:  # whatever a kernel raises that is not there
            if isinstance(as_device_error(error, "attention"), DeviceLost):
                raise
            return False

    @torch.inference_mode()
    def _agrees(self, varlen: Varlen, sequences: Sequence[tuple[int, int]]) -> bool:
        kv, spec = self._kv, self._spec
        chunks = [
            # Blocks from the last one on, with others between.
            Chunk([0] * count, start, start + count, range(kv.blocks - 1 - row, -1, -len(_MIXED)))
            for row, (start, count) in enumerate(sequences)
        ]
        batch = Batch.build(
            chunks,
            block_tokens=kv.block_tokens,
            windows=self._windows,
            device=self._device,
            ragged=True,
        )
        # As they come from one map: neighbouring tokens are further apart than their heads.
        heads = spec.heads + 2 * spec.kv_heads
        qkv = torch.empty(batch.tokens, heads, spec.head_dim, dtype=kv.dtype, device=self._device)
        qkv.normal_(generator=self._noise)
        q, k, v = torch.split(qkv, [spec.heads, spec.kv_heads, spec.kv_heads], 1)
        q = q.contiguous()
        kv.write(1, k, v, batch.slots)
        near = _TOLERANCE[kv.dtype]
        return all(
            torch.allclose(
                varlen(q, k, v, batch, kv, 1, window),
                attend(q, k, v, batch, kv, 1, window),
                rtol=near,
                atol=near,
            )
            for window in self._windows
        )
