"""A decode step padded to a bucket, all of whose numbers lie in one place that stays where it is.

What a captured step does is fixed: which kernels run, over which addresses, with which numbers
from the host. So all that differs between two steps is written to one tensor before each of them,
and everything else is made of that by kernels of the step itself. Numbers that kernels are given by
the host are those of the bucket: they bound what a sequence may be, and say nothing of what it is.

Rows that are left over repeat the sequence with the shortest context. They write what that writes,
where that writes it: so they need no KV block of anybody's.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from coldframe.runtime.engine.batch import SINGLES, Batch, Chunk, Reach, places
from coldframe.runtime.engine.buckets import Bucket
from coldframe.runtime.engine.device import send
from coldframe.runtime.engine.ragged import Ragged

__all__ = ["PaddedStep"]

_NOBODY = Chunk((0,), 0, 1, (0,))
"""One token of nobody, in the first block."""


class PaddedStep:
    """The steps of one bucket.

    Args:
        bucket: Their size.
        memory: Where their numbers are, int64; room for `bucket.numbers` at least. It may be that
            of other buckets, too: it is filled anew for each step.
        block_tokens: Tokens in a KV block.
        windows: The model's, each once.
        ragged: Whether one call attends over all sequences; else each window has its table.
    """

    def __init__(
        self,
        bucket: Bucket,
        memory: Tensor,
        *,
        block_tokens: int,
        windows: Iterable[int | None],
        ragged: bool,
    ) -> None:
        self.bucket = bucket
        self._numbers = memory[: bucket.numbers]
        self._block_tokens = block_tokens
        self._windows = () if ragged else tuple(windows)
        self._ragged = ragged

    @torch.inference_mode()
    def fill(self, chunks: Sequence[Chunk]) -> tuple[int, ...]:
        """Has the numbers of a step written to their place, behind what is queued already.

        Args:
            chunks: One token each, of as many sequences as the bucket has rows, or fewer.

        Returns:
            The blocks that get their first token in this step: they are to be cleared before it.

        Raises:
            RequestError: A sequence's token does not fit its blocks.
        """
        *_, fresh = places(chunks, self._block_tokens)
        shortest = min(chunks, key=lambda chunk: chunk.start)
        rows = [*chunks, *[shortest] * (self.bucket.sequences - len(chunks))]
        numbers = array("q", [chunk.token_ids[0] for chunk in rows])
        numbers.extend(chunk.start for chunk in rows)
        numbers.extend(chunk.prompt_length for chunk in rows)
        for table in map(self._table, rows):
            numbers += table
        send(numbers, self._numbers)
        return tuple(fresh)

    def fill_for_nobody(self) -> None:
        """The numbers of a step that looks at the first KV block and no other."""
        self.fill([_NOBODY])

    def _table(self, chunk: Chunk) -> array[int]:
        """A row's blocks; the rest of it repeats the first one, in which every number is finite."""
        # As an array: torch takes many times as long over a list.
        table = array("q", chunk.blocks[: chunk.start // self._block_tokens + 1])
        return table + table[:1] * (self.bucket.blocks - len(table))

    @torch.inference_mode()
    def batch(self) -> Batch:
        """The batch for the model, made by kernels alone of what lies in the memory.

        A new one for each time that the model runs: it keeps what was derived from it.
        """
        rows, width = self.bucket.sequences, self.bucket.blocks
        tokens, positions, prompts, flat = torch.split(
            self._numbers, [rows, rows, rows, rows * width]
        )
        table = flat.view(rows, width)
        places = positions.div(self._block_tokens, rounding_mode="floor")[:, None]
        first_slots = table.gather(1, places)[:, 0] * self._block_tokens
        numbered = torch.arange(rows, device=flat.device)
        return Batch(
            chunks=(_NOBODY,) * rows,
            block_tokens=self._block_tokens,
            offsets=tuple(range(rows + 1)),
            token_ids=tokens,
            positions=positions,
            slots=first_slots + positions.remainder(self._block_tokens),
            prompt_lengths=prompts,
            last=numbered,
            singles=tuple(range(rows)),
            single_rows=numbered,
            fresh=(),
            ragged=self._ragged_of(positions, table) if self._ragged else None,
            reaches={
                (SINGLES, window): self._reach(positions, table, window) for window in self._windows
            },
        )

    def _reach(self, positions: Tensor, table: Tensor, window: int | None) -> Reach:
        """The keys that the rows look at under one window, side by side."""
        unit, width = self._block_tokens, self.bucket.blocks
        queries = positions[:, None]
        if window is None:
            keys = torch.arange(width * unit, device=table.device)[None]
            return Reach(table, width * unit, (keys <= queries)[:, None, None])
        first = (queries + 1 - window).clamp(min=0).div(unit, rounding_mode="floor")
        # So many blocks can a window lie across, wherever it ends.
        across = min(width, (window + unit - 2) // unit + 1)
        columns = first + torch.arange(across, device=table.device)
        keys = first * unit + torch.arange(across * unit, device=table.device)
        seen = (keys <= queries) & (keys > queries - window)
        near = table.gather(1, columns.clamp(max=width - 1))
        return Reach(near, across * unit, seen[:, None, None])

    def _ragged_of(self, positions: Tensor, table: Tensor) -> Ragged:
        rows, width = self.bucket.sequences, self.bucket.blocks
        starts = torch.arange(rows + 1, dtype=torch.int32, device=table.device)
        blocks = table.int()
        return Ragged(
            starts=starts,
            lengths=(positions + 1).int(),
            table=blocks,
            blocks=blocks.view(-1),
            block_starts=starts * (width * self._block_tokens),
            longest=1,
            furthest=width * self._block_tokens,
            alone=False,
        )
