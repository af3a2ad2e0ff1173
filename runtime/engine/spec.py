"""What a checkpoint's config.json says about its model, checked, in the engine's own terms.

It imports nothing heavy: the front process reads a config with it while the workers are still
importing torch. A missing key means what it means to Transformers 5, wherever the tensors would
not show a wrong guess. What differs between families, and what is refused, is in `families.py`,
RoPE's own keys in `ropespec.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from coldframe.loader.checkpoints.stages import stage_of_each, unused
from coldframe.loader.errors import CheckpointError, UnsupportedModel
from coldframe.runtime.engine.families import (
    attention_windows,
    family_of,
    head_dimension,
    refuse_unsupported,
    stored_dtype,
)
from coldframe.runtime.engine.fields import Fields
from coldframe.runtime.engine.ropespec import RopeSpec

__all__ = ["ModelSpec", "TensorLike", "DTYPES"]

DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
"""The dtypes that the engine computes in, by their safetensors names, with their bytes."""


class TensorLike(Protocol):
    """What the spec needs to know of a stored tensor: its shape and its safetensors dtype."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> str: ...


FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A dense decoder's shape; see `from_config`.

    Attributes:
        family: `llama`, `mistral`, `qwen2` or `qwen3`; `FOREIGN` for what is not run here.
        dtype: Safetensors name of the dtype that weights are stored and computed in.
        heads: Query heads; `kv_heads` divides it.
        attention_bias: Biases on q, k and v.
        output_bias: A bias on the attention's output projection.
        mlp_bias: Biases on gate, up and down.
        qk_norm: RMSNorm over each head of q and k, before RoPE.
        windows: Per layer, how many tokens a token sees, itself included; None is all of them.
        tied: The head is the embedding.
        context_length: Tokens of prompt and answer together that the model is made for.
    """

    family: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    tied: bool
    rope: RopeSpec
    max_position_embeddings: int
    context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorLike] | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> ModelSpec:
        """Reads a Hugging Face config and, where the tensors are known, checks them against it.

        Args:
            config: The parsed config.json.
            tensors: The checkpoint's tensors by name. They decide the dtype.
            generation: The parsed generation_config.json. The end-of-text tokens that it names
                take the place of the config's: chat models name the end of a turn only there.

        Returns:
            The spec.

        Raises:
            UnsupportedModel: A sound model that the engine does not run.
            CheckpointError: A key is missing, ill-typed or absurd, or a tensor does not fit.
        """
        fields = Fields(config, "config.json")
        family = family_of(fields)
        refuse_unsupported(fields, family)
        heads = fields.positive("num_attention_heads")
        kv_heads = fields.positive("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
        hidden = fields.positive("hidden_size")
        head_dim = head_dimension(fields, family, hidden, heads)
        layers = fields.positive("num_hidden_layers")
        vocab = fields.positive("vocab_size")
        max_position = fields.positive("max_position_embeddings")
        attention_bias = fields.flag("attention_bias")
        rope = RopeSpec.from_config(fields, head_dim, max_position)
        ends = Fields(generation or {}, "generation_config.json").token_ids("eos_token_id", vocab)
        spec = cls(
            family=family,
            dtype=stored_dtype(fields),
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=fields.positive("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            attention_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias and family in ("llama", "qwen3"),
            mlp_bias=fields.flag("mlp_bias") and family == "llama",
            qk_norm=family == "qwen3",
            windows=attention_windows(fields, family, layers),
            tied=fields.flag("tie_word_embeddings"),
            rope=rope,
            max_position_embeddings=max_position,
            context_length=rope.context_length,
            bos_token_id=fields.token_id("bos_token_id", vocab),
            eos_token_ids=ends or fields.token_ids("eos_token_id", vocab),
        )
        if tensors is None:
            return spec
        embedding = tensors.get("model.embed_tokens.weight")
        spec = replace(
            spec,
            dtype=spec.dtype if embedding is None else embedding.dtype,
            # A head that is stored is used. Where it equals the embedding that changes nothing;
            # where it does not, Transformers 5 takes it for untied too.
            tied=spec.tied and "lm_head.weight" not in tensors,
        )
        spec.check(tensors)
        return spec

    @property
    def native(self) -> bool:
        """Whether the native engine runs it; see `foreign`."""
        return self.family != FOREIGN

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPES[self.dtype]

    def kv_token_bytes(self, dtype_bytes: int) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * dtype_bytes

    def kv_block_bytes(self, dtype_bytes: int, block_tokens: int = 32) -> int:
        """Bytes of one KV block, `[layer][2][token][kv_head][head_dim]`."""
        return block_tokens * self.kv_token_bytes(dtype_bytes)

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors that layer `layer` reads, by their names in the checkpoint."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, q),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if self.attention_bias:
            shapes["self_attn.q_proj.bias"] = (q,)
            shapes["self_attn.k_proj.bias"] = (kv,)
            shapes["self_attn.v_proj.bias"] = (kv,)
        if self.output_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.mlp_bias:
            shapes["mlp.gate_proj.bias"] = (inner,)
            shapes["mlp.up_proj.bias"] = (inner,)
            shapes["mlp.down_proj.bias"] = (hidden,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the engine reads, in order of use, with its shape."""
        matrix = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": matrix}
        for layer in range(self.layers):
            shapes.update(self.layer_tensors(layer))
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied:
            shapes["lm_head.weight"] = matrix
        return shapes

    def check(self, tensors: Mapping[str, TensorLike]) -> None:
        """Refuses a checkpoint whose tensors are not what the config promises.

        Matrices must all be of `dtype`; vectors may be of any of `DTYPES`, the engine casts them.
        Tensors outside the layers may be there in vain. Those of layers may not: a bias that is
        left out makes a wrong answer, and with other layers than the config says the stages of
        the load plan are not those that the engine waits for.

        Raises:
            UnsupportedModel: A layer has a tensor that the engine would not use.
            CheckpointError: A tensor is missing, or of another shape or dtype, or the number of
                layers is not the config's.
        """
        self._check_layers(tensors)
        for name, shape in self.expected_tensors().items():
            tensor = tensors.get(name)
            if tensor is None:
                hints = {
                    "lm_head.weight": "Set tie_word_embeddings to true if it is the embedding.",
                    # Some writers keep the first name of a tied pair, not the one used first.
                    "model.embed_tokens.weight": "If the checkpoint has it as lm_head.weight, "
                    "load it with Transformers and save it again.",
                }
                raise CheckpointError(
                    "the model needs a tensor that the checkpoint does not have",
                    where=name,
                    expected=f"shape {list(shape)}",
                    got="nothing",
                    hint=hints.get(name, "The checkpoint is incomplete; download it again."),
                )
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    "a tensor's shape does not match config.json",
                    where=name,
                    expected=list(shape),
                    got=list(tensor.shape),
                    hint="Take config.json and the weights from one and the same model.",
                )
            allowed = (self.dtype,) if len(shape) > 1 and self.dtype in DTYPES else tuple(DTYPES)
            if tensor.dtype not in allowed:
                raise CheckpointError(
                    "a tensor's dtype is not one that the engine computes in",
                    where=name,
                    expected=" or ".join(allowed),
                    got=tensor.dtype,
                    hint="Convert all weights to one of bf16, f16 and f32.",
                )

    def _check_layers(self, tensors: Mapping[str, TensorLike]) -> None:
        dropped = set(unused(tensors))
        names = [name for name in tensors if name not in dropped]
        _, layers = stage_of_each(names, where="the checkpoint")
        if layers > self.layers:
            raise CheckpointError(
                "the checkpoint has more layers than its config says",
                where="config.json: num_hidden_layers",
                expected=layers,
                got=self.layers,
                hint="Correct the config, or save a checkpoint of these layers alone.",
            )
        wanted = self.expected_tensors()
        for name in names:
            buffer = ".rotary_emb." in name  # computed from the config; some checkpoints store it
            if name.startswith("model.layers.") and name not in wanted and not buffer:
                raise UnsupportedModel(
                    "a layer has a tensor that the engine would not use",
                    where=name,
                    expected=f"the tensors of a {self.family} layer",
                    hint="See whether config.json says what the model has, as attention_bias.",
                )
