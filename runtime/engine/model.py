"""The decoder as plain functions over tensors that somebody else owns.

The weights are views of an arena that may still be filling: nothing here reads or casts a weight
before the method that needs it is called. `embed` needs stage 0, `layer(i)` stage i + 1,
`logits` the last one. The order of operations is that of Transformers, so that greedy tokens are
equal and float32 logits agree within 1e-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from coldframe.runtime.engine.attention import attend
from coldframe.runtime.engine.batch import Batch, Chunk
from coldframe.runtime.engine.device import settle
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.linear import linear
from coldframe.runtime.engine.rope import Rope, rotate
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.engine.weights import LayerWeights, Weights

if TYPE_CHECKING:
    from coldframe.runtime.engine.varlen import Varlen

__all__ = ["Model", "Batch", "Chunk"]


class Model:
    """A dense decoder over weights and KV memory that are mapped, not owned.

    Args:
        spec: The model's shape.
        tensors: Its weights by their names in the checkpoint, as `ModelSpec.check` accepts them.
            They may still be filling.
        kv: The cache that keys and values go to.

    Attributes:
        varlen: What attends over whole batches; None does it with `attend`. To be set before the
            first batch is made.
    """

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor], kv: KVCache) -> None:
        self.spec = spec
        self.kv = kv
        self.rope = Rope(spec.rope, spec.head_dim, kv.device)
        self.weights = Weights.of(tensors, spec)
        self.varlen: Varlen | None = None
        self._windows = tuple(dict.fromkeys(spec.windows))

    @property
    def device(self) -> torch.device:
        """Where it computes: where the cache is."""
        return self.kv.device

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens a token sees in some layer, each number once."""
        return self._windows

    def over(self, kv: KVCache) -> Model:
        """The same model over another cache, of the same kind and on the same device."""
        twin = copy(self)
        twin.kv = kv
        return twin

    def batch(self, chunks: Sequence[Chunk]) -> Batch:
        """The chunks as this model takes them; see `Batch.build`."""
        return Batch.build(
            chunks,
            block_tokens=self.kv.block_tokens,
            windows=self._windows if self.varlen is None else (),
            ragged=self.varlen is not None,
            device=self.device,
        )

    def settle(self) -> None:
        """Waits until all that was begun here is done, in the KV and with the weights.

        On a GPU a method returns when its work is queued. Until this has returned no other process
        may read or write a block that was written or read here, and no weight may be unmapped.
        """
        settle(self.device)

    def rebind(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on with the same weights at other addresses.

        To be called between two steps. Everything in flight goes on: a batch, a hidden state or a
        KV block knows nothing of the weights that made it. Once this returns, nothing looks
        into the old memory any more, and it may be unmapped; before, torch keeps nobody from that.

        Args:
            tensors: The weights by their names, of the same shapes, dtypes and values as before,
                in for every stage that was in before.
        """
        self.weights = Weights.of(tensors, self.spec)
        self.settle()

    @torch.inference_mode()
    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings, `[T, hidden_size]`; needs stage 0."""
        self.kv.clear(batch.fresh)
        return embedding(batch.token_ids, self.weights.embedding)

    @torch.inference_mode()
    def layer(self, index: int, x: Tensor, batch: Batch) -> Tensor:
        """One decoder layer, which also writes the batch's keys and values; needs stage index + 1.

        Args:
            index: Which layer.
            x: `[T, hidden_size]`, what the layer before it returned.
            batch: The batch.

        Returns:
            `[T, hidden_size]`.
        """
        w = self.weights.layers[index]
        x = x + self._attention(index, self._rms_norm(x, w.attention_norm), batch, w)
        h = self._rms_norm(x, w.mlp_norm)
        gate, up = w.gate_up(h)
        return x + linear(silu(gate) * up, w.down, w.down_bias)

    @torch.inference_mode()
    def logits(self, x: Tensor, batch: Batch, *, all_positions: bool = False) -> Tensor:
        """Logits in float32; needs the last stage.

        Args:
            x: `[T, hidden_size]`, what the last layer returned.
            batch: The batch.
            all_positions: For every token instead of each sequence's last one.

        Returns:
            `[S, vocab_size]`, or `[T, vocab_size]`.
        """
        if not all_positions and len(batch.chunks) != batch.tokens:
            x = x[batch.last]
        return linear(self._rms_norm(x, self.weights.norm), self.weights.head).float()

    def forward(self, batch: Batch) -> Tensor:
        """All of it, where all stages are in: logits `[S, vocab_size]`, float32."""
        x = self.embed(batch)
        for index in range(self.spec.layers):
            x = self.layer(index, x, batch)
        return self.logits(x, batch)

    def _attention(self, index: int, h: Tensor, batch: Batch, w: LayerWeights) -> Tensor:
        tokens, dim = len(h), self.spec.head_dim
        q, k, v = (out.view(tokens, -1, dim) for out in w.qkv(h))
        if w.q_norm is not None and w.k_norm is not None:
            q, k = self._rms_norm(q, w.q_norm), self._rms_norm(k, w.k_norm)
        if batch.rotation is None or batch.rows is None:
            batch.rotation = self.rope.cos_sin(batch.positions, batch.prompt_lengths, h.dtype)
            batch.rows = self.kv.rows(batch.slots)
        q, k = rotate(q, *batch.rotation), rotate(k, *batch.rotation)
        self.kv.write_rows(index, k, v, batch.rows)
        out = (self.varlen or attend)(q, k, v, batch, self.kv, index, self.spec.windows[index])
        return linear(out.reshape(tokens, -1), w.o, w.o_bias)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm, in float32 inside (arXiv 1910.07467)."""
        return rms_norm(x, weight.shape, weight.to(x.dtype), self.spec.rms_norm_eps)
