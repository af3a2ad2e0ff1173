"""Weights rewritten in the order in which they are loaded, as ordinary safetensors.

A checkpoint comes in the order in which somebody's training saved it, on boundaries of 8 bytes. A
packed one can be read front to back: each stage is one stretch of one file. The data begins on a
page, and tensors of odd size come last in their file, so that all others begin on a cache line:
mapped in place they run as fast as copied ones, and q, k and v, or gate and up, as one map.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from math import gcd
from pathlib import Path

from coldframe.loader.checkpoints.checkpoint import Checkpoint, TensorInfo
from coldframe.loader.checkpoints.pieces import PieceHasher, cuts_of
from coldframe.loader.checkpoints.plan import Layout, Plan
from coldframe.loader.checkpoints.seal import SealedShard, sha256
from coldframe.loader.errors import CheckpointError
from coldframe.loader.sources.base import Source
from coldframe.loader.strict_json import describe, parse_object
from coldframe.runtime.checkpoints.safetensors_writer import ALIGNMENT, TensorEntry, encode_header

__all__ = ["DATA_ALIGNMENT", "deal", "file_names", "merged_metadata", "write_shard"]

DATA_ALIGNMENT = 4096
_CHUNK = 8 << 20


def deal(checkpoint: Checkpoint, limit: int) -> list[list[TensorInfo]]:
    """Which tensors go into which file, and in which order.

    A file ends with a stage where that is possible, and inside one only where a stage has more
    bytes than a file may have. Tensors that no stage uses come last.

    Args:
        checkpoint: The opened checkpoint.
        limit: Bytes of tensors in a file; a tensor that has more gets a file of its own.

    Raises:
        CheckpointError: There is nothing that a model could use.
    """
    # Its order of use has q, k and v next to each other, and gate and up.
    plan = Plan.build(checkpoint, layout=Layout.ALIGNED)
    stages: list[list[TensorInfo]] = [[] for _ in plan.stages]
    for placement in sorted(plan.placements.values(), key=lambda p: p.arena_offset):
        stages[placement.stage].append(checkpoint.tensors[placement.name])
    stages.append([checkpoint.tensors[name] for name in plan.skipped])

    files: list[list[TensorInfo]] = [[]]
    size = 0

    def make_room(nbytes: int) -> None:
        nonlocal size
        if files[-1] and nbytes and size + nbytes > limit:
            files.append([])
            size = 0

    for stage in stages:
        make_room(sum(tensor.nbytes for tensor in stage))
        for tensor in stage:
            make_room(tensor.nbytes)
            files[-1].append(tensor)
            size += tensor.nbytes
    # Stable, so what is whole cache lines stays in order. The smaller the power of two in a size,
    # the later: then each begins on a multiple of its own, hence of its elements.
    return [sorted(file, key=lambda tensor: -gcd(tensor.nbytes, ALIGNMENT)) for file in files]


def file_names(count: int) -> list[str]:
    """What so many weight files are called, as Transformers calls them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def merged_metadata(headers: Sequence[tuple[str, bytes]]) -> dict[str, str]:
    """The `__metadata__` of all shards.

    Args:
        headers: The path of each shard and all that is before its data.

    Returns:
        All that they say. Where none says so, `format` is `pt`: Transformers wants it.

    Raises:
        CheckpointError: They contradict one another.
    """
    merged: dict[str, str] = {}
    for where, raw in headers:
        header = parse_object(raw[8:], where=where, hint="Download or save the file again.")
        for key, value in (header.get("__metadata__") or {}).items():
            if merged.setdefault(key, value) != value:
                raise CheckpointError(
                    "the shards' metadata contradict one another",
                    where=f"{where}, __metadata__ {describe(key)}",
                    expected=describe(merged[key]),
                    got=describe(value),
                    hint="Save the model again; one program writes all shards alike.",
                )
    return {"format": "pt", **merged}


def write_shard(
    path: Path,
    tensors: Sequence[TensorInfo],
    source: Source,
    metadata: dict[str, str],
    progress: Callable[[int], None],
) -> SealedShard:
    """Writes one file, and hashes it on the way.

    Args:
        path: The file; it must not exist yet.
        tensors: What goes into it, in the order of their data; where they are in `source`.
        source: The checkpoint that is packed. 8 MiB of it are in memory at a time.
        metadata: The file's `__metadata__`.
        progress: Called with the bytes of each chunk.

    Raises:
        SourceError: The checkpoint cannot be read.
        OSError: The file cannot be written.
    """
    entries = [TensorEntry(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    header = encode_header(entries, metadata, DATA_ALIGNMENT)
    hasher = PieceHasher(_cuts(len(header), tensors))
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("xb") as file:
        file.write(header)
        for tensor, start, stop in _chunks(tensors):
            view = buffer[: stop - start]
            source.read_into(tensor.shard, start, [view])
            hasher.update(view)
            file.write(view)
            progress(len(view))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return SealedShard(path.name, size, sha256(header), bytes(hasher.digests))


def _cuts(data_offset: int, tensors: Sequence[TensorInfo]) -> array[int]:
    spans, end = [], data_offset
    for tensor in tensors:
        spans.append((end, tensor.nbytes))
        end += tensor.nbytes
    return cuts_of(data_offset, spans)


def _chunks(tensors: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, int, int]]:
    """Stretches of the source's files, cut where a seal of theirs has pieces end."""
    for tensor in tensors:
        start, end = tensor.offset, tensor.offset + tensor.nbytes
        while start < end:
            stop = min(end, (start // _CHUNK + 1) * _CHUNK)
            yield tensor, start, stop
            start = stop
