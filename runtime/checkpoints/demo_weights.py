"""The shapes, the config and the random weights of a demo model.

Four families in three sizes, each with what sets the family apart: Mistral's sliding window,
Qwen2's biases, Qwen3's norms on q and k and a head_dim of its own. The numbers are chosen so that
greedy text is varied and depends on the whole prompt; `_spread` says how.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from coldframe.runtime.checkpoints.safetensors_writer import TensorEntry

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "FAMILIES", "SIZES", "DemoModel", "Size", "buffer"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""PyTorch's names of the dtypes, and those of the safetensors format."""

LOGIT_STD = 4.0
"""Of the logits; the likeliest of 32000 tokens then has a probability of some 10 %."""

EMBED_STD = 0.02

SCORE_STD = 3.0
"""Of the attention scores: peaked enough to look at single tokens, not at one alone."""


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a model; `tied` None leaves the head to the family's habit."""

    vocab: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    window: int
    shards: int
    tied: bool | None


SIZES = {
    "tiny": Size(1024, 128, 4, 352, 4, 2, 32, 1024, 64, 2, None),
    "small": Size(8192, 512, 6, 1408, 8, 2, 64, 2048, 256, 2, False),
    "base": Size(32000, 1024, 16, 2816, 16, 4, 64, 4096, 1024, 4, True),
}


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A demo model by its arguments; the same arguments give the same bytes.

    Args:
        size: A key of `SIZES`.
        family: One of `FAMILIES`.
        seed: Of the weights.
        dtype: A key of `DTYPES`.
    """

    size: str = "base"
    family: str = "llama"
    seed: int = 0
    dtype: str = "bfloat16"

    @property
    def shape(self) -> Size:
        """The numbers behind the size's name."""
        return SIZES[self.size]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding; small Qwen models are tied, the others are not."""
        return self.family.startswith("qwen") if self.shape.tied is None else self.shape.tied

    @property
    def head_dim(self) -> int:
        """The width of a head; Qwen3's is not hidden / heads."""
        return self.shape.head_dim * (2 if self.family == "qwen3" else 1)

    def config(self) -> dict[str, Any]:
        """The content of config.json, for Transformers 5 and for readers of the older keys."""
        size = self.shape
        theta = {"llama": 500_000.0, "mistral": 10_000.0}.get(self.family, 1_000_000.0)
        config: dict[str, Any] = {
            "architectures": [f"{self.family.capitalize()}ForCausalLM"],
            "model_type": self.family,
            "vocab_size": size.vocab,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": size.context,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5 if self.family in ("llama", "mistral") else 1e-6,
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": self.tied,
            "attention_dropout": 0.0,
            "initializer_range": EMBED_STD,
            "use_cache": True,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
        }
        if self.family != "qwen2":
            config["head_dim"] = self.head_dim
        if self.family == "llama":
            config |= {"attention_bias": False, "mlp_bias": False}
        if self.family == "mistral":
            config["sliding_window"] = size.window
        if self.family == "qwen3":
            config["attention_bias"] = False
        if self.family.startswith("qwen"):
            config |= {"use_sliding_window": False, "sliding_window": None}
        return config

    def tensors(self) -> list[TensorEntry]:
        """Every tensor in the order in which a forward pass uses them."""
        size, dtype = self.shape, DTYPES[self.dtype]
        hidden, inner = size.hidden, size.intermediate
        q_width, kv_width = size.heads * self.head_dim, size.kv_heads * self.head_dim
        found = [TensorEntry("model.embed_tokens.weight", dtype, (size.vocab, hidden))]

        def add(name: str, *shape: int) -> None:
            found.append(TensorEntry(name, dtype, shape))

        for index in range(size.layers):
            layer = f"model.layers.{index}"
            add(f"{layer}.input_layernorm.weight", hidden)
            for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
                add(f"{layer}.self_attn.{name}_proj.weight", width, hidden)
                if self.family == "qwen2":
                    add(f"{layer}.self_attn.{name}_proj.bias", width)
            if self.family == "qwen3":
                add(f"{layer}.self_attn.q_norm.weight", self.head_dim)
                add(f"{layer}.self_attn.k_norm.weight", self.head_dim)
            add(f"{layer}.self_attn.o_proj.weight", hidden, q_width)
            add(f"{layer}.post_attention_layernorm.weight", hidden)
            add(f"{layer}.mlp.gate_proj.weight", inner, hidden)
            add(f"{layer}.mlp.up_proj.weight", inner, hidden)
            add(f"{layer}.mlp.down_proj.weight", hidden, inner)
        add("model.norm.weight", hidden)
        if not self.tied:
            add("lm_head.weight", size.vocab, hidden)
        return found

    def parameters(self) -> int:
        """The number of parameters, a tied head counted once."""
        return sum(prod(entry.shape) for entry in self.tensors())

    def nbytes(self) -> int:
        """The size of the weights in bytes."""
        return sum(entry.nbytes for entry in self.tensors())

    def shards(self) -> list[list[TensorEntry]]:
        """The tensors in the model's order, cut into shards of about the same number of bytes."""
        entries = self.tensors()
        total = sum(entry.nbytes for entry in entries)
        shards: list[list[TensorEntry]] = [[] for _ in range(self.shape.shards)]
        before = 0
        for entry in entries:
            # A tensor belongs to the shard that its middle byte falls into.
            shards[(before + entry.nbytes // 2) * len(shards) // total].append(entry)
            before += entry.nbytes
        return shards

    def weights(
        self, entries: Sequence[TensorEntry], live_tokens: range
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors' values, one at a time.

        Each tensor has a generator of its own, so its values do not depend on the order. They are
        uniform and not normal: that takes no transcendental function, and so the bits are the
        same on every machine.

        Args:
            entries: The tensors to make.
            live_tokens: The ids that the model may choose; the rows of all others are so small
                that their logits are near zero, far below the largest.

        Yields:
            Names and tensors on the CPU, in the model's dtype.
        """
        import torch

        dtype = getattr(torch, self.dtype)
        for entry in entries:
            seed = hashlib.sha256(f"{self.seed}/{entry.name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "little"))
            mean, std = self._spread(entry.name)
            tensor = torch.empty(entry.shape, dtype=torch.float32)
            # U(0, 1) has a standard deviation of 1 / sqrt(12). One operation at a time: fused into
            # a multiply-add, which some machines do, it would round differently.
            tensor.uniform_(generator=generator).sub_(0.5).mul_(std * sqrt(12.0)).add_(mean)
            if entry.name in ("model.embed_tokens.weight", "lm_head.weight"):
                tensor[: live_tokens.start] *= 0.01
                tensor[live_tokens.stop :] *= 0.01
            yield entry.name, tensor.to(dtype)

    def _spread(self, name: str) -> tuple[float, float]:
        """The mean and the standard deviation of a tensor's values.

        With a tied head, a token's own embedding scores highest against itself, and a model
        whose residual stream is mostly that embedding repeats its last token for ever. So the
        embedding is small and each layer's output large: after one layer hardly anything of it is
        left, and what comes out is a function of the MLPs and of what attention has gathered.
        The final norm brings the logits to their scale. The norms' weights differ from one, so
        that leaving one out shows.
        """
        size = self.shape
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if name.endswith(".bias"):
            return 0.0, 0.1
        if kind == "embed_tokens":
            return 0.0, EMBED_STD
        if kind == "lm_head":
            return 0.0, LOGIT_STD / sqrt(size.hidden)
        if kind == "norm":
            gain = LOGIT_STD / (EMBED_STD * sqrt(size.hidden)) if self.tied else 1.0
            return gain, 0.1 * gain
        if kind in ("q_norm", "k_norm"):
            return sqrt(SCORE_STD), 0.1 * sqrt(SCORE_STD)
        if kind.endswith("norm"):
            return 1.0, 0.1
        if kind in ("q_proj", "k_proj"):
            return 0.0, sqrt(SCORE_STD / size.hidden)
        if kind == "o_proj":
            return 0.0, 2.0 / sqrt(size.heads * self.head_dim)
        if kind == "down_proj":
            return 0.0, 2.0 / sqrt(size.intermediate)
        return 0.0, 1.0 / sqrt(size.hidden)


def buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied, and without NumPy, which lacks bfloat16."""
    array = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(
        tensor.data_ptr()
    )
    array.owner = tensor  # type: ignore[attr-defined]  # the memory lives as long as the view
    return memoryview(array).cast("B")
