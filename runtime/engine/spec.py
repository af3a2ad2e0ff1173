"""What a checkpoint's config.json says about its model, checked, in the engine's own terms.

Covers the dense decoders of four families (Llama, Mistral, Qwen2, Qwen3) and refuses, by name,
whatever it does not run. It imports nothing heavy: the front process reads a config with it while
the workers are still importing torch. A missing key means what it means to Transformers 5, where
the tensors would not show a wrong guess. RoPE's own keys are read in `ropespec.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from coldframe.loader.errors import CheckpointError, UnsupportedModel
from coldframe.runtime.engine.fields import Fields
from coldframe.runtime.engine.ropespec import RopeSpec

__all__ = ["ModelSpec", "TensorLike", "DTYPES"]

DTYPES = {"BF16": 2, "F16": 2, "F32": 4}
"""The dtypes that the engine computes in, by their safetensors names, with their bytes."""

_TORCH_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
# Keys that other families use to scale or cap what flows through the network. A checkpoint that
# sets one under a name we know would run, and answer wrongly.
_SCALINGS = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
)


class TensorLike(Protocol):
    """What the spec needs to know of a stored tensor: its shape and its safetensors dtype."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A dense decoder's shape; see `from_config`.

    Attributes:
        family: `llama`, `mistral`, `qwen2` or `qwen3`.
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
        cls, config: Mapping[str, Any], tensors: Mapping[str, TensorLike] | None = None
    ) -> ModelSpec:
        """Reads a Hugging Face config and, where the tensors are known, checks them against it.

        Args:
            config: The parsed config.json.
            tensors: The checkpoint's tensors by name. They decide the dtype.

        Returns:
            The spec.

        Raises:
            UnsupportedModel: A sound model that the engine does not run.
            CheckpointError: A key is missing, ill-typed or absurd, or a tensor does not fit.
        """
        fields = Fields(config, "config.json")
        family = _family(fields)
        _refuse(fields, family)
        heads = fields.positive("num_attention_heads")
        kv_heads = fields.positive("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
        hidden = fields.positive("hidden_size")
        head_dim = _head_dim(fields, family, hidden, heads)
        layers = fields.positive("num_hidden_layers")
        vocab = fields.positive("vocab_size")
        max_position = fields.positive("max_position_embeddings")
        attention_bias = fields.flag("attention_bias")
        if family == "mistral" and attention_bias:
            raise UnsupportedModel(
                "a Mistral model has no attention biases",
                where="config.json: attention_bias",
                expected=False,
                got=True,
            )
        rope = RopeSpec.from_config(fields, head_dim, max_position)
        spec = cls(
            family=family,
            dtype=_dtype(fields),
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
            windows=_windows(fields, family, layers),
            tied=fields.flag("tie_word_embeddings"),
            rope=rope,
            max_position_embeddings=max_position,
            context_length=rope.context_length,
            bos_token_id=fields.token_id("bos_token_id", vocab),
            eos_token_ids=fields.token_ids("eos_token_id", vocab),
        )
        if tensors is None:
            return spec
        embedding = tensors.get("model.embed_tokens.weight")
        spec = replace(spec, dtype=spec.dtype if embedding is None else embedding.dtype)
        spec.check(tensors)
        return spec

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
        """Refuses a checkpoint whose tensors are not what the config promises; extra ones are fine.

        Matrices must all be of `dtype`; vectors may be of any of `DTYPES`, the engine casts them.

        Raises:
            CheckpointError: A tensor is missing, or of another shape or dtype.
        """
        for name, shape in self.expected_tensors().items():
            tensor = tensors.get(name)
            if tensor is None:
                hint = "Set tie_word_embeddings to true if the head is the embedding."
                raise CheckpointError(
                    "the model needs a tensor that the checkpoint does not have",
                    where=name,
                    expected=f"shape {list(shape)}",
                    got="nothing",
                    hint=hint if name == "lm_head.weight" else None,
                )
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    "a tensor's shape does not match config.json",
                    where=name,
                    expected=list(shape),
                    got=list(tensor.shape),
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


def _family(fields: Fields) -> str:
    kind = fields.text("model_type")
    names = fields.texts("architectures")
    by_architecture = {architecture: family for family, architecture in _FAMILIES.items()}
    supported = ", ".join(_FAMILIES.values())
    named = " ".join((*names, kind or ""))
    if "moe" in named.lower() or "mixtral" in named.lower():
        raise UnsupportedModel(
            "mixture of experts is not supported",
            where="config.json",
            expected=supported,
            got=named,
        )
    if not names and kind is None:
        raise CheckpointError(
            "the config names no model",
            where="config.json",
            expected=f"architectures: one of {supported}",
            got="neither architectures nor model_type",
        )
    families = {by_architecture.get(name) for name in names} or {kind}
    if kind is not None:
        families.add(kind)
    if len(families & set(_FAMILIES)) > 1:
        raise CheckpointError(
            "architectures and model_type name different models", where="config.json", got=named
        )
    family = families.pop() if len(families) == 1 else None
    if family not in _FAMILIES:
        raise UnsupportedModel(
            "this architecture is not supported",
            where="config.json: architectures" if names else "config.json: model_type",
            expected=supported,
            got=", ".join(names) or kind,
            hint="A model that the native engine does not run can be served through vLLM.",
        )
    return family


def _refuse(fields: Fields, family: str) -> None:
    """Refuses what would run and answer wrongly."""

    def unsupported(key: str, what: str, expected: object = None) -> UnsupportedModel:
        return UnsupportedModel(
            f"{what} is not supported",
            where=f"config.json: {key}",
            expected=expected,
            got=fields.get(key),
        )

    for key in ("quantization_config", "compression_config"):
        if fields.get(key) is not None:
            raise unsupported(key, "a quantised checkpoint")
    for key in _EXPERTS:
        if fields.get(key):
            raise unsupported(key, "mixture of experts")
    for key in _SCALINGS:
        # Exactly 1, or nothing, leaves the network as it is.
        if fields.get(key) not in (None, False, 1):
            raise unsupported(key, "scaling or capping of activations", "1 or nothing")
    for key in ("hidden_act", "hidden_activation"):
        if fields.get(key) not in (None, "silu", "swish"):
            raise unsupported(key, "this activation", "silu")
    if family == "qwen3" and fields.flag("mlp_bias"):
        raise unsupported("mlp_bias", "a bias in a Qwen3 MLP")


def _head_dim(fields: Fields, family: str, hidden: int, heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim = fields.positive("head_dim")
    elif family == "qwen3":
        head_dim = 128
    elif hidden % heads:
        raise fields.error("hidden_size", f"a multiple of {heads} heads", hidden)
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise fields.error("head_dim", "an even number, RoPE turns pairs", head_dim)
    return head_dim


def _windows(fields: Fields, family: str, layers: int) -> tuple[int | None, ...]:
    """Which layers see a sliding window, and how far it reaches."""
    slides = family == "mistral" or (
        family.startswith("qwen") and fields.flag("use_sliding_window")
    )
    window: int | None = None
    # Missing means 4096, null means none.
    if slides and fields.get("sliding_window", 4096) is not None:
        window = fields.positive("sliding_window", default=4096)
    kinds = fields.texts("layer_types")
    if family.startswith("qwen") and not kinds:
        full = fields.count("max_window_layers", default=28)
        return tuple(window if layer >= full else None for layer in range(layers))
    if not kinds:
        return (window,) * layers
    if len(kinds) != layers:
        raise fields.error("layer_types", f"{layers} entries, one a layer", len(kinds))
    known = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise UnsupportedModel(
                "this kind of layer is not supported",
                where="config.json: layer_types",
                expected=" or ".join(known),
                got=kind,
            )
    if window is None and "sliding_attention" in kinds:
        raise fields.error("sliding_window", "a window, as layer_types names sliding layers", None)
    windows = tuple(known[kind] for kind in kinds)
    if family == "mistral" and set(windows) != {window}:
        # Transformers' Mistral has one window for all layers and passes over layer_types.
        raise UnsupportedModel(
            "a Mistral model whose layers differ is not supported",
            where="config.json: layer_types",
            expected="sliding_attention in every layer" if window else "full_attention",
            got=", ".join(sorted(set(kinds))),
        )
    return windows


def _dtype(fields: Fields) -> str:
    name = fields.text("dtype") or fields.text("torch_dtype") or "float32"
    if name not in _TORCH_DTYPES:
        raise UnsupportedModel(
            "this dtype is not supported",
            where="config.json: dtype",
            expected=", ".join(_TORCH_DTYPES),
            got=name,
        )
    return _TORCH_DTYPES[name]
