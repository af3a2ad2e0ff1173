"""What a vLLM engine takes of a device's memory, beside what its replica has there already.

On a GPU it computes with the arena itself, wherever the weights are as it wants them. On a CPU it
packs the weights of linear layers for its kernels: another copy of nearly all of them. And it has
KV of its own. Nothing of that is refused by the kernel before it is touched, which then ends
whoever has the most, so it is reckoned before an engine is started.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from coldframe.loader.checkpoints.header import DTYPE_BITS
from coldframe.loader.checkpoints.stages import is_embedding, layer_of
from coldframe.loader.errors import DeviceFull
from coldframe.runtime.engine.spec import ModelSpec, TensorLike
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.replica.sizing import CONTEXT_BYTES
from coldframe.runtime.replica.vllm_spec import BLOCK_TOKENS

__all__ = ["ENGINE_BYTES", "copied_bytes", "default_kv", "kv_that_fits"]

ENGINE_BYTES = 192 << 20
"""What an engine on a CPU takes from its imports until it answers, but for weights and KV."""

_MOST_KV = 4 << 30
"""For a model of whose KV nothing is known here, in bytes."""
_IN_PLACE = ("F32", "F16", "BF16")
"""Weights that vLLM computes with as they are stored."""


def copied_bytes(spec: ModelSpec, tensors: Mapping[str, TensorLike], device: str) -> int:
    """The weights that the engine has a copy of, in bytes; rather too many than too few.

    Args:
        spec: The model.
        tensors: Its stored tensors by name.
        device: Where the engine computes.
    """
    copied = (t for name, t in tensors.items() if _is_copied(spec, name, t, device))
    return sum(DTYPE_BITS[t.dtype] * prod(t.shape) // 8 for t in copied)


def _is_copied(spec: ModelSpec, name: str, tensor: TensorLike, device: str) -> bool:
    if device != CPU:
        # What vLLM lays out anew after a load: experts, and what is quantised.
        return not spec.native and ("experts" in name.split(".") or tensor.dtype not in _IN_PLACE)
    if len(tensor.shape) < 2:
        return False
    # An embedding is looked up in its rows, unless it is the head as well.
    return spec.tied or layer_of(name) is not None or not is_embedding(name)


def default_kv(spec: ModelSpec, native_kv: int, free: int) -> int:
    """The KV of an engine on a CPU where nobody says, in bytes.

    Args:
        spec: The model.
        native_kv: What the replica's own has.
        free: What is left of the memory when all else of the engine is there.
    """
    # It is taken as it is touched, but vLLM takes none that is not there now.
    return min(native_kv if spec.native else _MOST_KV, max(0, free) // 4)


def kv_that_fits(
    spec: ModelSpec,
    tensors: Mapping[str, TensorLike],
    device: str,
    *,
    wanted: int | None,
    native_kv: int,
    coming: int,
    available: int,
    itself: int | None = None,
) -> int:
    """The KV of an engine that is to be started now, in bytes.

    Args:
        spec: The model.
        tensors: Its stored tensors by name.
        device: Where the engine is to compute.
        wanted: What was asked for; None takes as much as the replica's own KV has, and on a CPU a
            quarter of what is left at most.
        native_kv: What the replica's own KV has.
        coming: Bytes of the replica's weights that are still to come there.
        available: What of the device nobody has.
        itself: What the engine is still to take besides; by default what one that starts does.

    Raises:
        DeviceFull: There is not memory enough for such an engine.
    """
    copies = copied_bytes(spec, tensors, device)
    if itself is None:
        itself = ENGINE_BYTES if device == CPU else CONTEXT_BYTES
    least = 0
    left = available - copies - itself - coming
    if wanted is not None:
        kv = wanted
    else:
        kv = default_kv(spec, native_kv, left) if device == CPU else native_kv
        if spec.native:
            # One block, and one that may lie empty behind it.
            least = 2 * spec.kv_block_bytes(spec.dtype_bytes, BLOCK_TOKENS)
    if left < kv or left <= 0 or kv < least:
        kv = max(kv, least)
        parts = [(copies, "copies of weights"), (kv, "KV"), (itself, "the engine itself")]
        parts.append((coming, "weights that are still to come"))
        told = ", ".join(f"{_mb(nbytes)} for {what}" for nbytes, what in parts if nbytes)
        raise DeviceFull(
            "there is not memory enough for a vLLM engine beside the replica",
            where=device,
            expected=f"{_mb(copies + kv + itself + coming)} available: {told}",
            got=_mb(max(0, available)),
            hint="Give its KV less (--vllm-kv), or the replica's own (--kv-memory); else raise the "
            "container's memory limit, or let native workers decode alone.",
        )
    return kv


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"
