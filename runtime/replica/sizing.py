"""What a replica must know of its model before a worker is up: its spec, and room for KV.

How much memory a GPU has is not known here: there the memory service decides (`loader.kv.room`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from coldframe.loader.cgroup import memory_available
from coldframe.loader.checkpoints.checkpoint import Checkpoint, read_config, read_generation_config
from coldframe.loader.errors import CheckpointError, DeviceError, UnsupportedModel
from coldframe.loader.kv.room import KvRoom
from coldframe.loader.sources.location import Directory, parse_location
from coldframe.runtime.engine.foreign import foreign_spec
from coldframe.runtime.engine.spec import ModelSpec, TensorLike
from coldframe.runtime.machine.device_choice import CPU
from coldframe.runtime.options import BLOCK_TOKENS, ReplicaOptions

__all__ = [
    "CONTEXT_BYTES",
    "KvSize",
    "ModelFacts",
    "StoredTensor",
    "context_bytes",
    "facts_at_hand",
    "kv_blocks",
]

_MOST_KV = 4 << 30
CONTEXT_BYTES = 512 << 20
"""What a process takes of a GPU for itself: its context, kernels and the libraries' workspaces."""


class ModelFacts:
    """A checkpoint's configs and spec, without its weights.

    The headers are read too: they decide the dtype, and what does not fit shows before anything
    runs.

    Args:
        directory: Where its config lies, and its weights unless `tensors` says what is in them.
        tensors: The stored tensors by name, where their headers are elsewhere.
        vllm: Whether vLLM alone decodes: then it may be a model that the native engine does not
            run, and vLLM serves all of it.

    Raises:
        CheckpointError: It is not sound, or not a model that the engine runs.
        SourceError: It cannot be read.
    """

    def __init__(
        self,
        directory: str,
        tensors: Mapping[str, TensorLike] | None = None,
        *,
        vllm: bool = False,
    ) -> None:
        self.directory = directory
        self.weights_bytes: int | None = None
        """What the weights take; None where their headers are elsewhere."""
        if tensors is None:
            checkpoint = Checkpoint.open(directory)
            self.config: dict[str, Any] = checkpoint.config
            self.weights_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
            tensors = checkpoint.tensors
        else:
            self.config = read_config(directory)
        self.tensors: Mapping[str, TensorLike] = tensors
        self.generation: dict[str, Any] = read_generation_config(directory)
        try:
            try:
                self.spec = ModelSpec.from_config(self.config, tensors, self.generation)
            except UnsupportedModel:
                if not vllm:
                    raise
                self.spec = foreign_spec(self.config, self.generation)
        except CheckpointError as error:
            error.where = f"{directory}: {error.where}"
            raise


def facts_at_hand(options: ReplicaOptions) -> ModelFacts | None:
    """A model's facts where it lies in a directory, read here and now; None where it does not.

    Raises:
        CheckpointError: It is not sound, or not a model that the engine runs.
        SourceError: It cannot be read.
    """
    place = None if options.sources else parse_location(options.model)
    if not isinstance(place, Directory):
        return None
    return ModelFacts(options.model, vllm=options.vllm_alone)


class StoredTensor(NamedTuple):
    """What a spec needs to know of a tensor; see `TensorLike`."""

    dtype: str
    shape: Sequence[int]


class KvSize(NamedTuple):
    """How much KV there is to be.

    Attributes:
        block_bytes: Of a block.
        blocks: How many; None where the memory service is to say, by `room`.
        room: See `KvRoom`.
    """

    block_bytes: int
    blocks: int | None
    room: KvRoom | None = None

    @classmethod
    def of(cls, spec: ModelSpec, options: ReplicaOptions, device: str | None = None) -> KvSize:
        """What a replica asks for.

        Args:
            spec: The model.
            options: What the replica is to be.
            device: On which of its devices; by default on the first.

        Raises:
            DeviceError: It holds not one block, or is more than there is.
        """
        if not spec.native:
            # vLLM has KV of its own, and nobody else any. A memory service has a block at least.
            return cls(spec.kv_block_bytes(spec.dtype_bytes, BLOCK_TOKENS), 1)
        wanted = options.kv_bytes
        if options.device == CPU:
            return cls(*kv_blocks(spec, wanted))
        if wanted is not None:
            return cls(*kv_blocks(spec, wanted, available=wanted))  # the device itself will say no
        block = spec.kv_block_bytes(spec.dtype_bytes, BLOCK_TOKENS)
        device = device or options.devices[0]
        reserve = context_bytes(options, device)
        room = KvRoom(reserve=reserve, part=options.kv_part)
        if options.vllm is not None and options.device_of("vllm") == device:
            # It has KV of its own: as much as this is, where nobody says otherwise.
            own = options.vllm.kv_bytes
            room = replace(room, others=own or 0, split=2 if own is None else 1)
        return cls(block, None, room)


def context_bytes(options: ReplicaOptions, device: str) -> int:
    """What a replica's workers take of a device for themselves, in bytes."""
    if device == CPU:
        return 0
    scales = options.scales.items()
    return CONTEXT_BYTES * sum(s.most for role, s in scales if options.device_of(role) == device)


def kv_blocks(spec: ModelSpec, wanted: int | None, available: int | None = None) -> tuple[int, int]:
    """The size of a KV block in bytes, and how many of them a replica gets.

    Args:
        spec: The model.
        wanted: Bytes for KV; None takes a quarter of what is available, at most 4 GiB. Memory is
            taken as blocks are touched, so what counts is to leave room for others.
        available: Bytes that there are; None looks how much nobody has at the moment.

    Raises:
        DeviceError: It holds not one block, or is more than there is.
    """
    block = spec.kv_block_bytes(spec.dtype_bytes, BLOCK_TOKENS)
    if available is None:
        available = memory_available()
    size = max(block, min(_MOST_KV, available // 4)) if wanted is None else wanted
    if size > available:
        raise DeviceError(
            "the KV memory is larger than what is available",
            where="--kv-memory",
            expected=f"at most {available:,} bytes",
            got=f"{size:,}",
            hint="Ask for less; a quarter of what is available is the default.",
        )
    if size < block:
        raise DeviceError(
            "the KV memory holds not one block",
            where="--kv-memory",
            expected=f"at least {block:,} bytes",
            got=f"{size:,}",
            hint="Give it more.",
        )
    return block, size // block
