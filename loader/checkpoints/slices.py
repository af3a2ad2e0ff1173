"""Tensor-parallel slices: which rows or columns of each tensor a rank holds, told from its name.

The scheme is Megatron's (arXiv 1909.08053, section 3) with the names of dense Llama, Mistral,
Qwen2 and Qwen3 models, cut where vLLM cuts them (`QKVParallelLinear`, `MergedColumnParallelLinear`,
`RowParallelLinear` and `VocabParallelEmbedding`), so that a slice is what vLLM's parameter holds:

    q, k, v                  by rows, in whole heads; weights and biases
    gate, up                 by rows; weights and biases
    o, down                  weights by columns; biases whole
    embed_tokens, lm_head    by rows
    norms, all other names   whole

Where there are fewer KV heads than ranks, neighbouring ranks hold the same one. The vocabulary is
divided as if it were padded to a multiple of 64 rows; the padding is in no file and in no slice,
so the last ranks hold fewer rows than the first, or none.

This module says what to hold. What is read along with it, because skipping it costs more, is the
plan's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.header import DTYPE_BITS, TensorInfo
from coldframe.loader.errors import CheckpointError, ColdframeError
from coldframe.loader.strict_json import describe

__all__ = ["WHOLE", "Part", "Rank", "begin_of", "cut"]

_VOCAB_PADDING = 64  # rows; vLLM's DEFAULT_VOCAB_PADDING_SIZE

_BY_HEADS = re.compile(r"(?:^|\.)self_attn\.([qkv])_proj\.(?:weight|bias)$")
_BY_ROWS = re.compile(r"(?:^|\.)mlp\.(?:gate|up)_proj\.(?:weight|bias)$")
_BY_COLUMNS = re.compile(r"(?:^|\.)(?:self_attn\.o|mlp\.down)_proj\.weight$")
_BY_VOCAB = re.compile(r"(?:^|\.)(?:embed_tokens\.weight|lm_head\.(?:weight|bias))$")


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the devices that a model is divided over.

    Attributes:
        index: Which one, from 0.
        ranks: How many there are.

    Raises:
        ColdframeError: There is no such rank.
    """

    index: int
    ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.ranks:
            raise ColdframeError(
                "there is no such rank",
                expected="a rank from 0 to one below the number of ranks",
                got=f"rank {self.index} of {self.ranks}",
                hint="Ranks count from 0.",
            )


WHOLE = Rank(0, 1)
"""The only rank of a model that is not divided."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank holds of one tensor: `count` rows of `length` bytes, `stride` bytes apart.

    Attributes:
        name: The tensor's.
        dtype: As safetensors names it.
        shape: The dimensions of the part.
        shard: The index of its shard.
        offset: The position of its first byte in the file.
        length: Bytes that lie together in the file.
        count: How often; 1 for all that is not cut by columns.
        stride: From one to the next in the file, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""
        return self.length * self.count

    @property
    def span(self) -> int:
        """The bytes from its first to its last in the file, with what lies between its rows."""
        return (self.count - 1) * self.stride + self.length

    def rows(self) -> Iterator[Part]:
        """Its rows as parts of their own."""
        for row in range(self.count):
            yield replace(self, offset=self.offset + row * self.stride, count=1, stride=0)


def cut(checkpoint: Checkpoint, tensors: Iterable[TensorInfo], rank: Rank) -> list[Part]:
    """What a rank holds of each tensor.

    Args:
        checkpoint: The opened checkpoint; its config says how many heads there are.
        tensors: Those of its tensors that a model uses.
        rank: The rank.

    Returns:
        A part of each tensor, in the same order.

    Raises:
        CheckpointError: A tensor does not divide over so many ranks, its shape is not what the
            config says, or the config does not say it.
    """
    if rank.ranks == 1:
        return [_whole(tensor) for tensor in tensors]
    cutter = _Cutter(checkpoint, rank)
    return [cutter.part(tensor) for tensor in tensors]


def begin_of(tensor: TensorInfo, part: Part) -> tuple[int, ...]:
    """How many rows, columns and so on of a tensor lie before a part of it."""
    before = (part.offset - tensor.offset) * 8 // DTYPE_BITS[tensor.dtype]
    begin: list[int] = []
    for size in reversed(tensor.shape):
        begin.append(before % max(size, 1) if len(begin) + 1 < len(tensor.shape) else before)
        before //= max(size, 1)
    return tuple(reversed(begin))


class _Cutter:
    """Cuts the tensors of one checkpoint for one rank."""

    def __init__(self, checkpoint: Checkpoint, rank: Rank) -> None:
        self._checkpoint = checkpoint
        self._rank = rank

    def part(self, tensor: TensorInfo) -> Part:
        name = tensor.name
        if found := _BY_HEADS.search(name):
            size = self._size(tensor, 0)
            return self._rows(tensor, *self._heads(tensor, size, of_query=found[1] == "q"))
        if _BY_ROWS.search(name):
            return self._rows(tensor, *self._even(tensor, self._size(tensor, 0)))
        if _BY_COLUMNS.search(name):
            # Of o too: it takes the heads in the order in which q's rows make them.
            return self._columns(tensor, *self._even(tensor, self._size(tensor, 1)))
        if _BY_VOCAB.search(name):
            return self._rows(tensor, *self._vocabulary(tensor, self._size(tensor, 0)))
        return _whole(tensor)

    def _size(self, tensor: TensorInfo, dimension: int) -> int:
        dimensions = 1 if tensor.name.endswith(".bias") else 2
        if len(tensor.shape) != dimensions:
            raise self._error(
                "a tensor to be divided has other dimensions than it should",
                tensor,
                expected="a vector" if dimensions == 1 else "a matrix",
                got=f"shape {list(tensor.shape)}",
                hint="Load this checkpoint on one device.",
            )
        return tensor.shape[dimension]

    def _even(self, tensor: TensorInfo, size: int) -> tuple[int, int]:
        """The rank's share of rows or columns, from and up to."""
        each = self._divide(tensor, size, "rows or columns")
        return self._rank.index * each, (self._rank.index + 1) * each

    def _heads(self, tensor: TensorInfo, size: int, *, of_query: bool) -> tuple[int, int]:
        """The rank's share of the rows of q, k or v, from and up to."""
        heads = self._count("num_attention_heads")
        dim = self._head_dim(tensor, heads)
        if not of_query:
            heads = self._count("num_key_value_heads", heads)
        if size != heads * dim:
            raise self._error(
                "a tensor's shape does not match config.json",
                tensor,
                expected=f"{heads} heads of {dim}, {heads * dim} in all",
                got=size,
                hint="Take config.json and the weights from one and the same model.",
            )
        rank, ranks = self._rank.index, self._rank.ranks
        if not of_query and ranks > heads:
            if ranks % heads:
                raise self._indivisible(tensor, f"a divisor of {ranks}", f"{heads} KV heads")
            head = rank // (ranks // heads)
            return head * dim, (head + 1) * dim
        each = self._divide(tensor, heads, "heads" if of_query else "KV heads") * dim
        return rank * each, (rank + 1) * each

    def _vocabulary(self, tensor: TensorInfo, size: int) -> tuple[int, int]:
        padded = -(-size // _VOCAB_PADDING) * _VOCAB_PADDING
        each = self._divide(tensor, padded, "rows with padding")
        return min(self._rank.index * each, size), min((self._rank.index + 1) * each, size)

    def _divide(self, tensor: TensorInfo, size: int, what: str) -> int:
        if size % self._rank.ranks:
            raise self._indivisible(tensor, f"a multiple of {self._rank.ranks}", f"{size} {what}")
        return size // self._rank.ranks

    def _head_dim(self, tensor: TensorInfo, heads: int) -> int:
        """Rows of a head: as the config has it, else from the query projection beside it."""
        if self._checkpoint.config.get("head_dim") is not None:
            return self._count("head_dim")
        query = f"{tensor.name.rpartition('self_attn.')[0]}self_attn.q_proj.weight"
        found = self._checkpoint.tensors.get(query)
        # Not from the tensor itself: in a config that is silent on its KV heads, k would then
        # pass for one of many short heads, and be cut inside a real one.
        rows = found.shape[0] if found is not None and found.shape else 0
        if not rows or rows % heads:
            raise self._error(
                "how many rows a head has is not known",
                tensor,
                expected=f"head_dim in config.json, or {heads} heads in {describe(query)}",
                got=f"{rows} rows",
                hint="Take config.json and the weights from one and the same model.",
            )
        return rows // heads

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._checkpoint.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                "the config does not say what a division over ranks needs",
                where=f"{self._checkpoint.path}, config.json: {key}",
                expected="an integer of at least 1",
                got="nothing" if value is None else describe(value),
                hint="Take the config.json of the model, or load it on one device.",
            )
        return value

    def _rows(self, tensor: TensorInfo, start: int, stop: int) -> Part:
        row = prod(tensor.shape[1:]) * DTYPE_BITS[tensor.dtype]
        begin, end = self._bytes(tensor, start * row), self._bytes(tensor, stop * row)
        shape = (stop - start, *tensor.shape[1:])
        return _part(tensor, shape, offset=tensor.offset + begin, length=end - begin)

    def _columns(self, tensor: TensorInfo, start: int, stop: int) -> Part:
        rows, columns = tensor.shape
        bits = DTYPE_BITS[tensor.dtype]
        begin, end = self._bytes(tensor, start * bits), self._bytes(tensor, stop * bits)
        stride = self._bytes(tensor, columns * bits)
        shape = (rows, stop - start)
        part = _part(tensor, shape, offset=tensor.offset + begin, length=end - begin)
        return replace(part, count=rows, stride=stride)

    def _bytes(self, tensor: TensorInfo, bits: int) -> int:
        if bits % 8:
            raise self._error(
                "a packed tensor would be cut inside a byte",
                tensor,
                expected="rows and slices of whole bytes",
                got=f"{tensor.dtype}, shape {list(tensor.shape)}",
                hint="Take fewer ranks, or a model whose elements are whole bytes.",
            )
        return bits // 8

    def _indivisible(self, tensor: TensorInfo, expected: str, got: str) -> CheckpointError:
        return self._error(
            f"a tensor does not divide over {self._rank.ranks} ranks",
            tensor,
            expected=expected,
            got=got,
            hint="Take another number of ranks.",
        )

    def _error(
        self, what: str, tensor: TensorInfo, *, expected: object, got: object, hint: str
    ) -> CheckpointError:
        where = f"{self._checkpoint.path}, tensor {describe(tensor.name)}"
        return CheckpointError(what, where=where, expected=expected, got=got, hint=hint)


def _whole(tensor: TensorInfo) -> Part:
    return _part(tensor, tensor.shape, offset=tensor.offset, length=tensor.nbytes)


def _part(tensor: TensorInfo, shape: tuple[int, ...], *, offset: int, length: int) -> Part:
    return Part(tensor.name, tensor.dtype, shape, tensor.shard, offset, length)
