"""Keys of KV blocks: what two requests that begin alike have in common, as a chain of hashes.

A block's key stands for all tokens from the first to its last one, for the weights that made the
keys and values, and for how they lie in memory: equal keys are equal KV. The hash is long enough
that nobody can make another prompt with a given key, whose KV would answer somebody else's.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from coldframe.runtime.options import BLOCK_TOKENS

if TYPE_CHECKING:
    from coldframe.runtime.engine.ropespec import RopeSpec

__all__ = ["PrefixKeys", "kv_format"]

_BYTES = 32
_ID_BYTES = 4


def kv_format(dtype: str) -> str:
    """Names what KV blocks hold, so that no worker reads what another wrote differently."""
    return f"block-layer-kv-token-head/{BLOCK_TOKENS}/{dtype}"


class PrefixKeys:
    """Makes keys for one model.

    Args:
        fingerprint: Of the checkpoint whose weights make the KV.
        kv_format: What the blocks hold; see `kv_format`.
        block_tokens: Tokens in a block.
        rope: How the model rotates: under dynamic scaling a long request's KV is that of no other.
    """

    def __init__(self, fingerprint: str, kv_format: str, block_tokens: int, rope: RopeSpec) -> None:
        self._root = _hash(f"{fingerprint}\0{kv_format}".encode())
        self._block_bytes = block_tokens * _ID_BYTES
        self._block_tokens = block_tokens
        self._rope = rope

    def of(self, token_ids: Sequence[int], prompt_tokens: int) -> list[str]:
        """The keys of all full blocks.

        Args:
            token_ids: Of a request, from its first token on.
            prompt_tokens: How long its prompt is, all of it.

        Returns:
            One key a block; what is left over at the end has none.
        """
        tokens = min(len(token_ids), self._rope.steady_tokens(prompt_tokens))
        full = tokens // self._block_tokens * self._block_tokens
        packed = array("I", token_ids[:full])
        if sys.byteorder == "big":
            packed.byteswap()
        data, parent, keys = packed.tobytes(), self._root, []
        for start in range(0, len(data), self._block_bytes):
            parent = _hash(parent + data[start : start + self._block_bytes])
            keys.append(parent.hex())
        return keys


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=_BYTES).digest()
