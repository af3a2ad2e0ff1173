"""A ragged batch: the tokens of several requests in one row, and where each of them belongs.

Prefill, chunked prefill, catching up and decode differ only in what their batch looks like. Masks
are the same in every layer with the same window; a batch makes each once and keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from coldframe.loader.errors import RequestError

__all__ = ["Chunk", "Batch", "Reach"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one request contributes to a batch.

    Attributes:
        token_ids: The tokens to compute, at least one.
        start: How many tokens of the request are in the KV cache already.
        prompt_length: Tokens of the request's whole prompt (see `Rope.cos_sin`).
        blocks: The request's KV blocks, from its first token on; room for these tokens included.
    """

    token_ids: Sequence[int]
    start: int
    prompt_length: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Reach:
    """The keys that a group of sequences looks at under one window.

    Attributes:
        table: `[B, n]` int64, the blocks to gather.
        length: How many of the gathered tokens to keep, from the first.
        mask: True where a query sees a key; None where it sees all.
    """

    table: Tensor
    length: int
    mask: Tensor | None


@dataclass(slots=True)
class Batch:
    """T tokens of S sequences; see `build`.

    Attributes:
        chunks: What it was built from.
        offsets: S + 1 offsets into the tokens; sequence s has `offsets[s]:offsets[s + 1]`.
        token_ids, positions, slots, prompt_lengths: `[T]` int64.
        last: `[S]` int64, the row of each sequence's last token.
        singles: Sequences of one token, which attend together; `single_rows` are their rows.
        fresh: Blocks that get their first token here and are not filled by it.
    """

    chunks: tuple[Chunk, ...]
    block_tokens: int
    offsets: tuple[int, ...]
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    prompt_lengths: Tensor
    last: Tensor
    singles: tuple[int, ...]
    single_rows: Tensor
    fresh: tuple[int, ...]
    # What the model derives from the above, once a batch.
    rotation: tuple[Tensor, Tensor] | None = None
    rows: Tensor | None = None
    _reaches: dict[tuple[int, int | None], Reach] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        chunks: Sequence[Chunk],
        *,
        block_tokens: int = 32,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Lays the chunks one after another.

        Args:
            chunks: One a request, in the order in which logits come back.
            block_tokens: Tokens in a KV block.
            device: Where the batch is computed.

        Raises:
            RequestError: A chunk is empty or has not enough blocks.
        """
        positions: list[int] = []
        slots: list[int] = []
        offsets = [0]
        fresh: list[int] = []
        for chunk in chunks:
            end = chunk.start + len(chunk.token_ids)
            room = len(chunk.blocks) * block_tokens
            if end == chunk.start or end > room:
                raise RequestError(
                    "a request's tokens do not fit its KV blocks",
                    expected=f"1 to {room - chunk.start} tokens after the first {chunk.start}",
                    got=len(chunk.token_ids),
                )
            positions.extend(range(chunk.start, end))
            slots.extend(
                chunk.blocks[p // block_tokens] * block_tokens + p % block_tokens
                for p in range(chunk.start, end)
            )
            offsets.append(offsets[-1] + len(chunk.token_ids))
            first_of_last_block = end // block_tokens * block_tokens
            if chunk.start <= first_of_last_block < end:
                fresh.append(chunk.blocks[end // block_tokens])
        lengths = [len(chunk.token_ids) for chunk in chunks]
        singles = tuple(s for s, length in enumerate(lengths) if length == 1)

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            chunks=tuple(chunks),
            block_tokens=block_tokens,
            offsets=tuple(offsets),
            token_ids=tensor(list(chain.from_iterable(c.token_ids for c in chunks))),
            positions=tensor(positions),
            slots=tensor(slots),
            prompt_lengths=tensor(
                [c.prompt_length for c, n in zip(chunks, lengths, strict=True) for _ in range(n)]
            ),
            last=tensor([offset - 1 for offset in offsets[1:]]),
            singles=singles,
            single_rows=tensor([offsets[s] for s in singles]),
            fresh=tuple(fresh),
        )

    @classmethod
    def concat(cls, batches: Sequence[Batch]) -> Batch:
        """Joins batches that have reached the same layer, in this order.

        The caller joins their hidden states with `torch.cat` in the same order.
        """
        return cls.build(
            [chunk for batch in batches for chunk in batch.chunks],
            block_tokens=batches[0].block_tokens,
            device=batches[0].token_ids.device,
        )

    @property
    def tokens(self) -> int:
        """T."""
        return self.offsets[-1]

    def reach(self, sequence: int, window: int | None) -> Reach:
        """The keys that the tokens of one sequence look at."""
        key = (sequence, window)
        if key not in self._reaches:
            chunk = self.chunks[sequence]
            end = chunk.start + len(chunk.token_ids)
            first = self._first_block(chunk.start, window)
            table = chunk.blocks[first : -(-end // self.block_tokens)]
            skipped = first * self.block_tokens
            queries = self.positions[self.offsets[sequence] : self.offsets[sequence + 1], None]
            keys = torch.arange(skipped, end, device=queries.device)
            self._reaches[key] = Reach(
                torch.tensor([table], device=queries.device),
                end - skipped,
                _visible(queries, keys, window),
            )
        return self._reaches[key]

    def single_reach(self, window: int | None) -> Reach:
        """The keys that all sequences of one token look at, side by side.

        Shorter ones are padded with a block of their own, which the mask hides.
        """
        key = (-1, window)
        if key not in self._reaches:
            chunks = [self.chunks[s] for s in self.singles]
            firsts = [self._first_block(chunk.start, window) for chunk in chunks]
            lasts = [chunk.start // self.block_tokens for chunk in chunks]
            width = max(last - first for first, last in zip(firsts, lasts, strict=True)) + 1
            table = []
            for chunk, first, last in zip(chunks, firsts, lasts, strict=True):
                blocks = list(chunk.blocks[first : last + 1])
                table.append(blocks + blocks[:1] * (width - len(blocks)))
            device = self.positions.device
            queries = self.positions[self.single_rows]
            skipped = torch.tensor(firsts, device=device) * self.block_tokens
            if len(chunks) == 1:
                length = chunks[0].start + 1 - firsts[0] * self.block_tokens
            else:
                length = width * self.block_tokens
            keys = skipped[:, None] + torch.arange(length, device=device)
            whole = len(chunks) == 1 and (window is None or length <= window)
            mask = None if whole else _visible(queries[:, None], keys, window)[:, None, None]
            self._reaches[key] = Reach(torch.tensor(table, device=device), length, mask)
        return self._reaches[key]

    def _first_block(self, position: int, window: int | None) -> int:
        """The first block that a token at `position` still sees something of."""
        return 0 if window is None else max(0, position + 1 - window) // self.block_tokens


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)
