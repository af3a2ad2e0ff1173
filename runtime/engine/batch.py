"""A ragged batch: the tokens of several requests in one row, and where each of them belongs.

Prefill, chunked prefill, catching up and decode differ only in what their batch looks like. All
that it says in numbers goes to the device in one piece, when it is built. Masks are the same in
every layer with the same window; a batch makes each once and keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from coldframe.loader.errors import RequestError
from coldframe.runtime.engine.device import upload
from coldframe.runtime.engine.ragged import Ragged

__all__ = ["SINGLES", "Batch", "Chunk", "Reach", "places"]

SINGLES = -1
"""Stands for all sequences of one token where one sequence's number is asked for."""


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
        ragged: What one call over all sequences takes, where that was asked for.
        reaches: The keys that are looked at, by sequence and window, as far as anybody has asked.
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
    ragged: Ragged | None = None
    # What the model derives from the above, once a batch.
    rotation: tuple[Tensor, Tensor] | None = None
    rows: Tensor | None = None
    reaches: dict[tuple[int, int | None], Reach] = field(default_factory=dict)
    _tables: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    _skipped: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        chunks: Sequence[Chunk],
        *,
        block_tokens: int = 32,
        windows: Iterable[int | None] = (None,),
        ragged: bool = False,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Lays the chunks one after another.

        Args:
            chunks: One a request, in the order in which logits come back.
            block_tokens: Tokens in a KV block.
            windows: The model's, each once: how many tokens a token sees in some layer. None of
                them where only `ragged` is used.
            ragged: Whether to add what one call over all sequences takes.
            device: Where the batch is computed.

        Raises:
            RequestError: A chunk is empty or has not enough blocks.
        """
        positions, slots, offsets, fresh = places(chunks, block_tokens)
        singles = tuple(s for s, chunk in enumerate(chunks) if len(chunk.token_ids) == 1)
        tables, skipped = _looked_at(chunks, singles, windows, block_tokens)
        on_device = iter(
            upload(
                [
                    list(chain.from_iterable(c.token_ids for c in chunks)),
                    positions,
                    slots,
                    list(chain.from_iterable([c.prompt_length] * len(c.token_ids) for c in chunks)),
                    [offset - 1 for offset in offsets[1:]],
                    [offsets[s] for s in singles],
                    *tables.values(),
                    *skipped.values(),
                    Ragged.numbers(chunks, block_tokens) if ragged else [],
                ],
                device,
            )
        )
        return cls(
            chunks=tuple(chunks),
            block_tokens=block_tokens,
            offsets=tuple(offsets),
            token_ids=next(on_device),
            positions=next(on_device),
            slots=next(on_device),
            prompt_lengths=next(on_device),
            last=next(on_device),
            singles=singles,
            single_rows=next(on_device),
            fresh=tuple(fresh),
            _tables=dict(zip(tables, on_device, strict=False)),
            _skipped=dict(zip(skipped, on_device, strict=False)),
            ragged=Ragged.of(chunks, block_tokens, next(on_device)) if ragged else None,
        )

    @property
    def tokens(self) -> int:
        """T."""
        return self.offsets[-1]

    def sees_itself_alone(self, sequence: int, window: int | None) -> bool:
        """Whether the tokens of a sequence look at nothing but all those before them here."""
        return _sees_itself_alone(self.chunks[sequence], window)

    def reach(self, sequence: int, window: int | None) -> Reach:
        """The keys that the tokens of one sequence look at, where it has several.

        Args:
            sequence: One that does not see itself alone.
            window: One of those that the batch was built for.
        """
        key = (sequence, window)
        if key not in self.reaches:
            chunk = self.chunks[sequence]
            end = chunk.start + len(chunk.token_ids)
            skipped = _first_block(chunk.start, window, self.block_tokens) * self.block_tokens
            queries = self.positions[self.offsets[sequence] : self.offsets[sequence + 1], None]
            keys = torch.arange(skipped, end, device=queries.device)
            self.reaches[key] = Reach(
                self._tables[key][None], end - skipped, _visible(queries, keys, window)
            )
        return self.reaches[key]

    def single_reach(self, window: int | None) -> Reach:
        """The keys that all sequences of one token look at, side by side."""
        key = (SINGLES, window)
        if key not in self.reaches:
            chunks = [self.chunks[s] for s in self.singles]
            table = self._tables[key].view(len(chunks), -1)
            length = table.shape[1] * self.block_tokens
            if len(chunks) == 1:
                length -= -(chunks[0].start + 1) % self.block_tokens
            skipped = self._skipped[window]
            keys = skipped[:, None] + torch.arange(length, device=skipped.device)
            queries = self.positions[self.single_rows]
            whole = len(chunks) == 1 and (window is None or length <= window)
            mask = None if whole else _visible(queries[:, None], keys, window)[:, None, None]
            self.reaches[key] = Reach(table, length, mask)
        return self.reaches[key]


def places(
    chunks: Sequence[Chunk], block_tokens: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Each token's position and slot, where each sequence begins, and the blocks that are fresh.

    Raises:
        RequestError: See `Batch.build`.
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
    return positions, slots, offsets, fresh


def _looked_at(
    chunks: Sequence[Chunk],
    singles: Sequence[int],
    windows: Iterable[int | None],
    block_tokens: int,
) -> tuple[dict[tuple[int, int | None], list[int]], dict[int | None, list[int]]]:
    """The blocks to gather under each window, by sequence, and one after the other for all singles.

    Returns:
        The blocks, and how many tokens of each single lie before its first one.
    """
    tables: dict[tuple[int, int | None], list[int]] = {}
    skipped: dict[int | None, list[int]] = {}
    for window in windows:
        for s, chunk in enumerate(chunks):
            if len(chunk.token_ids) > 1 and not _sees_itself_alone(chunk, window):
                tables[s, window] = _table(chunk, window, block_tokens)
        if singles:
            found = [_table(chunks[s], window, block_tokens) for s in singles]
            width = max(map(len, found))
            # Shorter ones are padded with a block of their own, which the mask hides.
            padded = [table + table[:1] * (width - len(table)) for table in found]
            tables[SINGLES, window] = list(chain.from_iterable(padded))
            skipped[window] = [
                _first_block(chunks[s].start, window, block_tokens) * block_tokens for s in singles
            ]
    return tables, skipped


def _sees_itself_alone(chunk: Chunk, window: int | None) -> bool:
    return chunk.start == 0 and (window is None or len(chunk.token_ids) <= window)


def _first_block(position: int, window: int | None, block_tokens: int) -> int:
    """The first block that a token at `position` still sees something of."""
    return 0 if window is None else max(0, position + 1 - window) // block_tokens


def _table(chunk: Chunk, window: int | None, block_tokens: int) -> list[int]:
    """The blocks that a chunk's tokens look at."""
    first = _first_block(chunk.start, window, block_tokens)
    end = chunk.start + len(chunk.token_ids)
    return list(chunk.blocks[first : -(-end // block_tokens)])


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)
