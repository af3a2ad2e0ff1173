"""The KV cache: blocks of 32 tokens in a flat piece of memory that outlives this process.

The layout is a contract with the memory service, which hands blocks out, and with the worker that
a request is handed to: `[block][layer][2][token][kv_head][head_dim]`, keys before values. One
block is one contiguous run, so a layer's view of all blocks has a page stride. Who owns which
block is not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coldframe.loader.errors import ArenaError
from coldframe.runtime.engine.spec import ModelSpec

__all__ = ["KVCache"]


class KVCache:
    """Reads and writes keys and values in blocks.

    Args:
        memory: 1-D tensor over the arena, uint8 or `dtype`; used in place, never copied. Nothing
            is assumed of what it holds.
        spec: The model.
        dtype: Of keys and values.
        blocks: How many blocks the memory holds; the rest of it is left alone.
        block_tokens: Tokens in a block.

    Raises:
        ArenaError: The memory is too small.
    """

    def __init__(
        self,
        memory: Tensor,
        spec: ModelSpec,
        dtype: torch.dtype,
        blocks: int,
        block_tokens: int = 32,
    ) -> None:
        needed = blocks * spec.kv_block_bytes(dtype.itemsize, block_tokens)
        if memory.numel() * memory.itemsize < needed:
            raise ArenaError(
                "the KV memory is too small",
                expected=f"at least {needed} bytes for {blocks} blocks",
                got=f"{memory.numel() * memory.itemsize} bytes",
            )
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.device = memory.device
        flat = memory.view(torch.uint8)[:needed].view(dtype)
        shape = (blocks, spec.layers, 2, block_tokens, spec.kv_heads, spec.head_dim)
        self.pages = flat.view(shape)
        # The same memory as rows of one token each. A row's number without its layer depends on
        # the slot alone, so a batch computes it once (`rows`) and each layer starts its view at
        # its own offset: no index arithmetic per layer.
        rows = flat.view(-1, spec.kv_heads * spec.head_dim)
        self._page_rows = spec.layers * 2 * block_tokens
        starts = [layer * 2 * block_tokens for layer in range(spec.layers)]
        self._keys = [rows[start:] for start in starts]
        self._values = [rows[start + block_tokens :] for start in starts]
        self._page_views = [(self.pages[:, i, 0], self.pages[:, i, 1]) for i in range(spec.layers)]

    def rows(self, slots: Tensor) -> Tensor:
        """Where the tokens of `slots` lie, for `write_rows`.

        Args:
            slots: `[T]` int64, block * block_tokens + offset.

        Returns:
            `[T]` int64.
        """
        blocks = slots.div(self.block_tokens, rounding_mode="floor")
        return slots + blocks * (self._page_rows - self.block_tokens)

    def write(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Stores the keys and values of T tokens.

        Args:
            layer: Which layer.
            k, v: `[T, kv_heads, head_dim]`.
            slots: `[T]` int64, block * block_tokens + offset.
        """
        self.write_rows(layer, k, v, self.rows(slots))

    def write_rows(self, layer: int, k: Tensor, v: Tensor, rows: Tensor) -> None:
        """`write` with the slots already turned into `rows`."""
        self._keys[layer].index_copy_(0, rows, k.reshape(len(rows), -1))
        self._values[layer].index_copy_(0, rows, v.reshape(len(rows), -1))

    def layer_rows(self, layer: int) -> Tensor:
        """The cache from a layer's first row on, where it lies: what `rows` numbers.

        Its values are `block_tokens` rows behind its keys.

        Returns:
            `[R, kv_heads * head_dim]`.
        """
        return self._keys[layer]

    def rows_of(self, block_table: Tensor) -> Tensor:
        """Where the keys of whole blocks lie, in every layer.

        Args:
            block_table: `[B, n]` int64 block ids.

        Returns:
            `[B, n * block_tokens]` int64.
        """
        within = torch.arange(self.block_tokens, device=block_table.device)
        return (block_table[:, :, None] * self._page_rows + within).flatten(1)

    def gather(self, layer: int, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of whole blocks, in the order of a table.

        Args:
            layer: Which layer.
            block_table: `[B, n]` int64 block ids.

        Returns:
            k and v, each `[B, kv_heads, n * block_tokens, head_dim]` (a transposed view of a copy).
        """
        batch, _ = block_table.shape
        k, v = self.run(layer, block_table.reshape(-1))
        heads, dim = k.shape[1:]
        k, v = k.view(batch, -1, heads, dim), v.view(batch, -1, heads, dim)
        return k.transpose(1, 2), v.transpose(1, 2)

    def run(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of whole blocks, copied one behind the other.

        Args:
            layer: Which layer.
            blocks: `[n]` block ids.

        Returns:
            k and v, each `[n * block_tokens, kv_heads, head_dim]`.
        """
        keys, values = self._page_views[layer]
        shape = (-1, *keys.shape[2:])
        return keys.index_select(0, blocks).view(shape), values.index_select(0, blocks).view(shape)

    def layer_pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of all blocks, where they lie.

        Returns:
            k and v, each `[blocks, block_tokens, kv_heads, head_dim]` with a page stride.
        """
        return self._page_views[layer]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes whole blocks, before their new owner writes its first token into them.

        Attention reads a sequence's last block to its end and masks what is not written yet. The
        weight of a masked token is exactly zero, but zero times infinity or NaN is NaN: what a
        former owner may have left there must be finite, and after this it is.

        Args:
            blocks: Block ids.
        """
        for block in blocks:
            self.pages[block].zero_()

    def forget(self, block: int, offset: int) -> None:
        """Zeroes one token of a block, in all layers."""
        self.pages[block, :, :, offset].zero_()
