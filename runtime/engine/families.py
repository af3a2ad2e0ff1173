"""What tells the supported families apart in a config, and what is refused by name.

The four families (Llama, Mistral, Qwen2, Qwen3) are one network with switches; the switches are
set by different keys, some of them unwritten. Torch-free, like all that reads a config.
"""

from __future__ import annotations

from coldframe.loader.errors import CheckpointError, UnsupportedModel
from coldframe.runtime.engine.fields import Fields

__all__ = [
    "attention_windows",
    "family_of",
    "head_dimension",
    "refuse_unsupported",
    "stored_dtype",
]

_TORCH_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
# Keys that other families use to cap or scale what flows through the network. A checkpoint that
# sets one under a name we know would run, and answer wrongly.
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_SCALINGS = (
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
)


def family_of(fields: Fields) -> str:
    """The family that a config names: `llama`, `mistral`, `qwen2` or `qwen3`.

    Raises:
        UnsupportedModel: It names another.
        CheckpointError: It names none, or two.
    """
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
        )
    return family


def refuse_unsupported(fields: Fields, family: str) -> None:
    """Refuses what would run and answer wrongly.

    Raises:
        UnsupportedModel: Quantised weights, experts, scaled or capped activations, or biases that
            the family does not have.
    """

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
    for key in _CAPS:
        if fields.get(key):
            raise unsupported(key, "capping of logits", "nothing")
    for key in _SCALINGS:
        if fields.get(key) not in (None, 1):
            raise unsupported(key, "scaling of activations", "1 or nothing")
    for key in ("hidden_act", "hidden_activation"):
        if fields.get(key) not in (None, "silu", "swish"):
            raise unsupported(key, "this activation", "silu")
    if family != "llama" and fields.flag("mlp_bias"):
        raise unsupported("mlp_bias", f"an MLP with biases in a {family} model", False)
    if family == "mistral" and fields.flag("attention_bias"):
        raise unsupported("attention_bias", "attention with biases in a mistral model", False)


def head_dimension(fields: Fields, family: str, hidden: int, heads: int) -> int:
    """Dimensions of a head, which need not be hidden size / heads."""
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


def attention_windows(fields: Fields, family: str, layers: int) -> tuple[int | None, ...]:
    """Per layer, how many tokens a token sees, itself included; None is all of them."""
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


def stored_dtype(fields: Fields) -> str:
    """The dtype that the config claims, by its safetensors name."""
    name = fields.text("dtype") or fields.text("torch_dtype") or "float32"
    if name not in _TORCH_DTYPES:
        raise UnsupportedModel(
            "this dtype is not supported",
            where="config.json: dtype",
            expected=", ".join(_TORCH_DTYPES),
            got=name,
        )
    return _TORCH_DTYPES[name]
