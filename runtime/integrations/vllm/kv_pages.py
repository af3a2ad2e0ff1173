"""The KV arena as tensors, its tokens' keys and values read and written in canonical form."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from coldframe.loader.errors import ArenaError
from coldframe.loader.memory_client.client import KvArena
from coldframe.runtime.integrations.vllm.fingerprint import Fingerprint
from coldframe.runtime.options import BLOCK_TOKENS
from coldframe.runtime.worker.tensors import tensor_over, torch_dtypes

__all__ = ["KvPages", "checksum"]

_GROWN_S = 5.0


class KvPages:
    """Tokens in blocks of the arena, `[block][layer][2][token][kv_head][head_dim]`.

    Args:
        kv: The arena, mapped here.
        fingerprint: What its blocks hold.

    Raises:
        ArenaError: Its blocks are of another size.
    """

    def __init__(self, kv: KvArena, fingerprint: Fingerprint) -> None:
        layers, heads, dim = fingerprint.layers, fingerprint.kv_heads, fingerprint.head_dim
        dtypes = torch_dtypes()
        if fingerprint.kv_dtype not in dtypes:
            raise ArenaError(
                "KV of this dtype does not travel",
                expected=", ".join(dtypes),
                got=fingerprint.kv_dtype,
                hint="Take the model's own dtype for the KV cache (--kv-cache-dtype auto).",
            )
        dtype = dtypes[fingerprint.kv_dtype]
        needed = layers * 2 * BLOCK_TOKENS * heads * dim * dtype.itemsize
        if kv.block_bytes != needed:
            raise ArenaError(
                "the arena's KV blocks are not those of vLLM's model",
                expected=f"{needed:,} bytes",
                got=f"{kv.block_bytes:,} bytes",
            )
        memory = tensor_over(kv.reservation.address, kv.nbytes, kv.reservation.dlpack_device)
        self._kv = kv
        self.device, self.dtype = memory.device, dtype
        self.token_bytes = needed // BLOCK_TOKENS
        self.layers, self.heads = layers, heads
        self._shape = (heads, dim)
        self._page_rows = layers * 2 * BLOCK_TOKENS
        # As in `engine/kv.py`: a row is a token's keys, or its values, in one layer; its number
        # but for the layer depends on the slot alone.
        self._rows = memory.view(dtype).view(-1, heads * dim)

    def rows(self, blocks: Sequence[int], start: int, end: int) -> Tensor:
        """Where a request's tokens lie, but for the layer.

        Args:
            blocks: The request's.
            start, end: Which of its tokens.

        Returns:
            `[end - start]` int64, on the arena's device.

        Raises:
            ArenaError: There is no memory behind one of them.
        """
        self._wait_grown(max(blocks, default=0) + 1)
        positions = torch.arange(start, end)
        pages = torch.tensor(blocks, dtype=torch.int64)[positions // BLOCK_TOKENS]
        return (pages * self._page_rows + positions % BLOCK_TOKENS).to(self.device)

    def _wait_grown(self, blocks: int) -> None:
        """Waits until there is memory behind so many blocks: another process than this one may have
        got them, and have heard of it first."""
        deadline = time.monotonic() + _GROWN_S
        while self._kv.grown < blocks * self._kv.block_bytes:
            if time.monotonic() > deadline:
                raise ArenaError(
                    "the KV arena has not the memory of a block that was given out",
                    expected=f"{blocks * self._kv.block_bytes:,} bytes",
                    got=f"{self._kv.grown:,} bytes",
                )
            time.sleep(0.001)

    def read(self, layer: int, rows: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens in one layer.

        Args:
            layer: Which.
            rows: As `rows` says.
            heads: Of the KV heads, those wanted.

        Returns:
            k and v, each `[T, heads, head_dim]`, copies.
        """
        k, v = (place.index_select(0, rows) for place in self._places(layer))
        k, v = k.view(-1, *self._shape), v.view(-1, *self._shape)
        if heads != slice(0, self._shape[0]):
            return k[:, heads].contiguous(), v[:, heads].contiguous()
        return k, v

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor, heads: slice) -> None:
        """Stores keys and values; see `read`."""
        for place, values in zip(self._places(layer), (k, v), strict=True):
            values = values.to(self.device)
            if heads == slice(0, self._shape[0]):
                place.index_copy_(0, rows, values.reshape(len(rows), -1))
            else:
                place.view(-1, *self._shape)[:, heads].index_copy_(0, rows, values)

    def _places(self, layer: int) -> tuple[Tensor, Tensor]:
        first = layer * 2 * BLOCK_TOKENS
        return self._rows[first:], self._rows[first + BLOCK_TOKENS :]


def checksum(k: Tensor, v: Tensor) -> str:
    """xxh3 of 64 bits over a layer's keys, then its values, of all tokens in canonical form."""
    digest = xxhash.xxh3_64()
    for part in (k, v):
        digest.update(part.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
