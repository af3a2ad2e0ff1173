"""What must be the same in two engines for one to go on with the other's keys and values.

Keys and values travel in one canonical form (`runtime/engine/kv.py`), so that how an engine lays
them out is its own affair. What must not differ is what they are of: the weights, the dtype, the
shapes, and the rotation of the keys. An engine tells its peers more of itself: its version, what
computes its attention, its block size. A sender that knows its receiver says for whom a hand-off
is; a receiver that is not that one any more computes the KV itself.

Without torch and vLLM, but for `of_engine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from coldframe.runtime.worker.prefix import kv_format

if TYPE_CHECKING:
    from coldframe.runtime.engine.spec import ModelSpec

__all__ = ["Fingerprint", "differences", "kv_differences", "native", "of_engine", "rope_facts"]

_ENGINES_OWN = ("engine", "version", "attention", "block_tokens")
"""What may differ where KV comes in the canonical form."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """An engine, as far as its KV tells of it.

    Args:
        model: Of the checkpoint (`plan.fingerprint`).
        kv_dtype: Safetensors name of the dtype of keys and values.
        kv_format: The canonical form, see `prefix.kv_format`.
        layers: Layers with KV.
        kv_heads: Of the whole model, whatever a rank has of them.
        head_dim: Numbers in a head.
        rope: How keys are rotated; see `rope_facts`.
        engine: `native` or `vllm`.
        version: Of the engine.
        attention: What computes attention, and so says how KV lies in the engine's own cache.
        block_tokens: Tokens in a block of its own cache.
    """

    model: str
    kv_dtype: str
    kv_format: str
    layers: int
    kv_heads: int
    head_dim: int
    rope: str
    engine: str = "native"
    version: str = ""
    attention: str = ""
    block_tokens: int = 0

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Fingerprint:
        """The fingerprint that another process sent; what this version does not know is left out.

        Raises:
            KeyError, TypeError: It is none.
        """
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})


def differences(one: Fingerprint, other: Fingerprint) -> dict[str, tuple[Any, Any]]:
    """What differs between two engines: by name, what the one has and what the other."""
    theirs = other.to_wire()
    return {n: (mine, theirs[n]) for n, mine in one.to_wire().items() if mine != theirs[n]}


def kv_differences(one: Fingerprint, other: Fingerprint) -> dict[str, tuple[Any, Any]]:
    """What of that makes the KV of one of no use to the other."""
    found = differences(one, other)
    return {name: both for name, both in found.items() if name not in _ENGINES_OWN}


def rope_facts(config: Mapping[str, Any]) -> str:
    """How a model's keys are rotated, by its config.json, as text that can be compared.

    Both spellings of a config, `rope_theta` beside `rope_scaling` and `rope_parameters`, give the
    same. What a kind of RoPE is not told has no default here: it is of the same checkpoint, or of
    none that compares.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = given.get("rope_type") or given.get("type") or "default"
    theta = given.get("rope_theta", config.get("rope_theta", 10000.0))
    facts = {"theta": float(theta), "type": kind}
    facts["max_position"] = config.get("max_position_embeddings")
    facts["partial"] = config.get("partial_rotary_factor", given.get("partial_rotary_factor", 1))
    left_out = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    facts.update({k: v for k, v in given.items() if k not in left_out and v is not None})
    return " ".join(f"{name}={_shown(value)}" for name, value in sorted(facts.items()))


def native(spec: ModelSpec, model: str, config: Mapping[str, Any]) -> Fingerprint:
    """Of the native engine.

    Args:
        spec: The model's.
        model: `plan.fingerprint`.
        config: The parsed config.json.
    """
    from coldframe.runtime.options import BLOCK_TOKENS

    return Fingerprint(
        model,
        spec.dtype,
        kv_format(spec.dtype),
        spec.layers,
        spec.kv_heads,
        spec.head_dim,
        rope_facts(config),
        attention="native",
        block_tokens=BLOCK_TOKENS,
    )


def of_engine(vllm_config: Any, model: str, attention: str = "") -> Fingerprint:
    """Of a vLLM engine; to be called in its process.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        model: Fingerprint of the checkpoint that its weights are of.
        attention: Its attention backend's name, where it is known already.
    """
    import vllm

    config, cache = vllm_config.model_config, vllm_config.cache_config
    dtype = _DTYPES.get(str(config.dtype).removeprefix("torch."), str(config.dtype))
    if cache.cache_dtype != "auto" and str(cache.cache_dtype) != str(config.dtype):
        dtype = _DTYPES.get(str(cache.cache_dtype), str(cache.cache_dtype))
    text = config.hf_text_config
    return Fingerprint(
        model,
        dtype,
        kv_format(dtype),
        text.num_hidden_layers,
        config.get_total_num_kv_heads(),
        config.get_head_size(),
        rope_facts(text.to_dict()),
        "vllm",
        vllm.__version__,
        attention,
        cache.block_size or 0,
    )


_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def _shown(value: Any) -> str:
    return f"{float(value):g}" if isinstance(value, (int, float)) else str(value)
