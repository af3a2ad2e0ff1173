"""The decoder as plain functions over tensors that somebody else owns.

The weights are views of an arena that may still be filling: nothing here reads, casts or fuses a
weight before the method that needs it is called. `embed` needs stage 0, `layer(i)` stage i + 1,
`logits` the last one. The order of operations is that of Transformers, so that greedy tokens are
equal and float32 logits agree within 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, silu

from coldframe.runtime.engine.attention import attend
from coldframe.runtime.engine.batch import Batch, Chunk
from coldframe.runtime.engine.kv import KVCache
from coldframe.runtime.engine.rope import Rope, rotate
from coldframe.runtime.engine.spec import ModelSpec

__all__ = ["Model", "Batch", "Chunk"]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights; what the model does not have is None."""

    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], spec: ModelSpec, index: int) -> _Layer:
        """The layer's tensors by name; it looks at none of them."""
        prefix = f"model.layers.{index}."
        wanted = spec.layer_tensors(index)

        def get(name: str) -> Tensor | None:
            return tensors[prefix + name] if prefix + name in wanted else None

        return cls(
            attention_norm=tensors[prefix + "input_layernorm.weight"],
            q=tensors[prefix + "self_attn.q_proj.weight"],
            k=tensors[prefix + "self_attn.k_proj.weight"],
            v=tensors[prefix + "self_attn.v_proj.weight"],
            o=tensors[prefix + "self_attn.o_proj.weight"],
            mlp_norm=tensors[prefix + "post_attention_layernorm.weight"],
            gate=tensors[prefix + "mlp.gate_proj.weight"],
            up=tensors[prefix + "mlp.up_proj.weight"],
            down=tensors[prefix + "mlp.down_proj.weight"],
            q_bias=get("self_attn.q_proj.bias"),
            k_bias=get("self_attn.k_proj.bias"),
            v_bias=get("self_attn.v_proj.bias"),
            o_bias=get("self_attn.o_proj.bias"),
            gate_bias=get("mlp.gate_proj.bias"),
            up_bias=get("mlp.up_proj.bias"),
            down_bias=get("mlp.down_proj.bias"),
            q_norm=get("self_attn.q_norm.weight"),
            k_norm=get("self_attn.k_norm.weight"),
        )


class Model:
    """A dense decoder over weights and KV memory that are mapped, not owned.

    Args:
        spec: The model's shape.
        tensors: Its weights by their names in the checkpoint, as `ModelSpec.check` accepts them.
            They may still be filling.
        kv: The cache that keys and values go to.
    """

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor], kv: KVCache) -> None:
        self.spec = spec
        self.kv = kv
        self.rope = Rope(spec.rope, spec.head_dim, kv.device)
        self._embedding = tensors["model.embed_tokens.weight"]
        self._layers = [_Layer.of(tensors, spec, index) for index in range(spec.layers)]
        self._norm = tensors["model.norm.weight"]
        self._head = self._embedding if spec.tied else tensors["lm_head.weight"]

    @torch.inference_mode()
    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings, `[T, hidden_size]`; needs stage 0."""
        self.kv.clear(batch.fresh)
        return embedding(batch.token_ids, self._embedding)

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
        w = self._layers[index]
        x = x + self._attention(index, self._rms_norm(x, w.attention_norm), batch, w)
        h = self._rms_norm(x, w.mlp_norm)
        inner = silu(_linear(h, w.gate, w.gate_bias)) * _linear(h, w.up, w.up_bias)
        return x + _linear(inner, w.down, w.down_bias)

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
        return _linear(self._rms_norm(x, self._norm), self._head).float()

    def forward(self, batch: Batch) -> Tensor:
        """All of it, where all stages are in: logits `[S, vocab_size]`, float32."""
        x = self.embed(batch)
        for index in range(self.spec.layers):
            x = self.layer(index, x, batch)
        return self.logits(x, batch)

    def _attention(self, index: int, h: Tensor, batch: Batch, w: _Layer) -> Tensor:
        tokens, dim = len(h), self.spec.head_dim
        q = _linear(h, w.q, w.q_bias).view(tokens, -1, dim)
        k = _linear(h, w.k, w.k_bias).view(tokens, -1, dim)
        v = _linear(h, w.v, w.v_bias).view(tokens, -1, dim)
        if w.q_norm is not None and w.k_norm is not None:
            q, k = self._rms_norm(q, w.q_norm), self._rms_norm(k, w.k_norm)
        if batch.rotation is None or batch.rows is None:
            batch.rotation = self.rope.cos_sin(batch.positions, batch.prompt_lengths, h.dtype)
            batch.rows = self.kv.rows(batch.slots)
        q, k = rotate(q, *batch.rotation), rotate(k, *batch.rotation)
        self.kv.write_rows(index, k, v, batch.rows)
        out = attend(q, k, v, batch, self.kv, index, self.spec.windows[index])
        return _linear(out.reshape(tokens, -1), w.o, w.o_bias)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm, in float32 inside (arXiv 1910.07467)."""
        return rms_norm(x, weight.shape, weight.to(x.dtype), self.spec.rms_norm_eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, by the kernel that reads the weight fastest.

    A step of one or two tokens is bound by reading the weights. In bfloat16 on a CPU, oneDNN packs
    each matrix before it multiplies, and reads 17 to 25 GB/s where ATen's own dot products read 40
    to 50 (two cores with AVX512-BF16, torch 2.13). From three tokens on oneDNN is the faster one.
    """
    if bias is not None:
        bias = bias.to(x.dtype)
    if len(x) > 2 or x.dtype != torch.bfloat16 or not x.is_cpu:
        return linear(x, weight, bias)
    with _onednn_off():
        return linear(x, weight, bias)


@contextmanager
def _onednn_off() -> Iterator[None]:
    # `torch.backends.mkldnn.flags` would do, but sets precision flags too, which warns.
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
