"""Attention of a whole ragged batch in one call, where torch has a kernel for it on this device.

It is the one behind `torch.nn.attention.varlen`, called by its operator: that module imports
torch's compiler, which takes longer than many a model's weights. A kernel either reads keys and
values in their blocks, by a table, or wants each sequence's in one run. Which of that this torch
has for this device, this dtype, and a cache whose blocks are a page stride apart, is not concluded
from versions: `find` looks at the operator's parameters, calls it on the device, and holds what
comes out against what `attention.attend` computes. Where nothing agrees with that, `attend` it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coldframe.loader.errors import DeviceLost
from coldframe.runtime.engine.attention import attend
from coldframe.runtime.engine.batch import Batch, Chunk
from coldframe.runtime.engine.device_errors import as_device_error
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.spec import ModelSpec

__all__ = ["WAYS", "Finding", "Varlen", "Way", "find"]

_OPERATOR = "_flash_attention_forward"
_NEEDED = {"window_size_left", "window_size_right", "seqused_k"}
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Relative and absolute: two roundings of the result."""
_Sequences = tuple[tuple[int, int], ...]
_MIXED: _Sequences = ((0, 70), (0, 1), (40, 1), (33, 50), (95, 1), (0, 33))
_ALONE: _Sequences = ((0, 70), (0, 1), (0, 33))
_SINGLES: _Sequences = ((40, 1), (95, 1), (0, 1))
"""Sequences to compare with: how many tokens there are before the batch, and how many in it."""
_WINDOW = 20
"""To compare under, where the model has windows."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a kernel is called.

    Args:
        paged: Keys and values are read where they lie, by a table.
        starts: It is told where each sequence's keys begin, with a table too: some kernels insist
            on that, others refuse it.
        one_split: The keys of a sequence are not to be split among several that work on them. How
            many do so would depend on who else is in the batch. And with a table, splits have gone
            wrong (pytorch/pytorch#179760, pytorch/pytorch#194167); without, a kernel may have
            no such parameter.
    """

    paged: bool
    starts: bool
    one_split: bool

    def __str__(self) -> str:
        parts = ["over pages" if self.paged else "over copied blocks"]
        parts += ["told their starts"] if self.paged and self.starts else []
        parts += [] if self.one_split else ["split at will"]
        return ", ".join(parts)


WAYS = (
    Way(paged=True, starts=False, one_split=True),
    Way(paged=True, starts=True, one_split=True),
    Way(paged=False, starts=True, one_split=True),
    Way(paged=False, starts=True, one_split=False),
)
"""The best first."""


class Varlen:
    """A kernel for ragged batches, and how it is called.

    Args:
        operator: ATen's `_flash_attention_forward`, or what has its parameters.
        way: How.
    """

    def __init__(self, operator: Callable[..., Sequence[Tensor]], way: Way) -> None:
        self.way = way
        self._operator = operator

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
        ragged, way = batch.ragged, self.way
        assert ragged is not None
        options: dict[str, Any] = {"num_splits": 1} if way.one_split else {}
        starts = ragged.block_starts if way.starts else None
        if way.paged:
            k, v = kv.layer_pages(layer)
            options["block_table"] = ragged.table
        elif ragged.alone:
            starts = ragged.starts
        else:
            k, v = kv.run(layer, ragged.blocks)
        out, *_ = self._operator(
            q,
            k,
            v,
            ragged.starts,
            starts,
            ragged.longest,
            ragged.furthest,
            0.0,  # no dropout
            window is None,  # causal
            False,  # no mask to look at
            window_size_left=-1 if window is None else window - 1,
            # A window ends where a causal mask does. Without one nothing is said: a kernel that is
            # told of any bound cannot treat the heads that share keys as positions of one sequence,
            # as it does where each sequence has one token.
            window_size_right=-1 if window is None else 0,
            seqused_k=ragged.lengths,
            **options,
        )
        return out


@dataclass(frozen=True, slots=True)
class Finding:
    """What a trial has found.

    Args:
        varlen: The kernel and the best way to call it; None where none does.
        refused: Why each better way is not taken.
    """

    varlen: Varlen | None
    refused: tuple[tuple[Way, str], ...] = ()

    def __str__(self) -> str:
        """For a timeline."""
        found = "by sequence" if self.varlen is None else str(self.varlen.way)
        return "; ".join(
            [f"attention {found}", *(f"not {way}: {why}" for way, why in self.refused)]
        )


def find(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_tokens: int = 32,
    operator: Callable[..., Sequence[Tensor]] | None = None,
) -> Finding:
    """Tries in which way to call the kernel here, the best one first.

    Args:
        spec: The model's shape.
        dtype: Of keys and values.
        device: Where they are.
        block_tokens: Tokens in a KV block.
        operator: See `Varlen`; None takes torch's, where it has one.

    Raises:
        RuntimeError: The device did not survive the trial (see `device_errors`), or cannot compute
            what the kernel is held against.
    """
    if operator is None:
        operator = getattr(getattr(torch.ops.aten, _OPERATOR, None), "default", None)
    if operator is None:
        return Finding(None)
    known = _parameters(operator)
    refused: list[tuple[Way, str]] = []
    trial: _Trial | None = None
    for way in WAYS:
        optional = {"block_table": way.paged, "num_splits": way.one_split}
        lacks = (_NEEDED | {name for name, used in optional.items() if used}) - known
        if lacks:
            refused.append((way, f"no parameter {', '.join(sorted(lacks))}"))
            continue
        trial = trial or _Trial(spec, dtype, device, block_tokens)
        varlen = Varlen(operator, way)
        complaint = trial.complaint(varlen)
        if not complaint:
            return Finding(varlen, tuple(refused))
        refused.append((way, complaint))
    return Finding(None, tuple(refused))


def _parameters(operator: Callable[..., object]) -> set[str]:
    schema = getattr(operator, "_schema", None)
    if schema is not None:
        return {argument.name for argument in schema.arguments}
    return set(inspect.signature(operator).parameters)


_GOLDEN = 0.6180339887498949
"""The steps of a sequence that fills an interval evenly."""


@dataclass(frozen=True, slots=True)
class _Case:
    """A batch with its queries, keys and values, and what is expected under each window."""

    batch: Batch
    q: Tensor
    k: Tensor
    v: Tensor
    expected: dict[int | None, Tensor]


class _Trial:
    """Batches of all kinds of sequences, over a cache of noise."""

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, block_tokens: int
    ) -> None:
        self._spec = replace(spec, layers=2, windows=(None, None))
        self._device = device
        # Of the model's windows each kind, so small that it bites.
        self._windows = {None if window is None else _WINDOW for window in spec.windows}
        width = max(-(-(start + count) // block_tokens) for start, count in _MIXED)
        blocks = len(_MIXED) * width
        size = blocks * self._spec.kv_block_bytes(dtype.itemsize, block_tokens)
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._kv = KVCache(memory, self._spec, dtype, blocks, block_tokens)
        _scatter(self._kv.pages)
        self._cases: dict[_Sequences, _Case] = {}

    def complaint(self, varlen: Varlen) -> str:
        """What is wrong with a way; nothing where it computes what `attend` does.

        Raises:
            RuntimeError: The device is lost, or `attend` itself cannot be computed.
        """
        near = _TOLERANCE[self._kv.dtype]
        for sequences in (_MIXED, _ALONE, _SINGLES):
            case = self._case(sequences)
            with torch.inference_mode():
                self._kv.write(1, case.k, case.v, case.batch.slots)
            for window, expected in case.expected.items():
                try:
                    with torch.inference_mode():
                        found = varlen(case.q, case.k, case.v, case.batch, self._kv, 1, window)
                        same = torch.allclose(found, expected, rtol=near, atol=near)
                except Exception as error:  # whatever a kernel raises that is not there
                    if isinstance(as_device_error(error, "attention"), DeviceLost):
                        raise
                    return str(error).partition("\n")[0] or repr(error)
                if not same:
                    return "it computes something else"
        return ""

    def _case(self, sequences: _Sequences) -> _Case:
        """A batch, and what `attend` makes of it; computed once, when it is asked for."""
        if sequences not in self._cases:
            self._cases[sequences] = self._make(sequences)
        return self._cases[sequences]

    @torch.inference_mode()
    def _make(self, sequences: _Sequences) -> _Case:
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
        _scatter(qkv)
        q, k, v = torch.split(qkv, [spec.heads, spec.kv_heads, spec.kv_heads], 1)
        q = q.contiguous()
        kv.write(1, k, v, batch.slots)
        expected = {window: attend(q, k, v, batch, kv, 1, window) for window in self._windows}
        return _Case(batch, q, k, v, expected)


def _scatter(tensor: Tensor) -> None:
    """Fills a tensor with numbers of mean 0 and variance 1, no two neighbours alike.

    Not by a generator: torch has none where it was imported without what its compiler needs.
    """
    steps = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
    tensor.copy_((steps.mul_(_GOLDEN).frac_().sub_(0.5).mul_(12**0.5)).view(tensor.shape))
