"""Layered checkpoints, what they hold by the safetensors library, and the page cache's state."""

from __future__ import annotations

import os
import random
from pathlib import Path

import safetensors

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.checkpoints.sealing import seal_checkpoint
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.file import FileSource
from tests.loader.checkpoints.written import Tensor, write_model


def layered(root: Path, *, layers: int = 3, nbytes: int = 20_000, shards: int = 2) -> Path:
    """A model with an embedding, layers and a head, its tensors dealt out over the shards."""
    names = ["model.embed_tokens.weight"]
    for layer in range(layers):
        names += [f"model.layers.{layer}.mlp.weight", f"model.layers.{layer}.attn.weight"]
    names += ["model.norm.weight", "lm_head.weight"]
    dealt: list[list[Tensor]] = [[] for _ in range(shards)]
    for seed, name in enumerate(names):
        # Sizes that are no multiples of a page, nor all alike.
        size = nbytes + 37 * seed
        data = random.Random(seed).randbytes(size)
        dealt[seed % shards].append((name, "U8", [size], data))
    return write_model(root, dealt)


def sealed(root: Path) -> Path:
    """The same model, with a seal from now on."""
    checkpoint = Checkpoint.open(root, sealed=False)
    source = FileSource(checkpoint.shards)
    seal_checkpoint(checkpoint, DirectoryOrigin(str(root)), source).write(str(root))
    source.close()
    return root


def shard_files(root: Path) -> list[Path]:
    return sorted(root.glob("*.safetensors"))


def reference(root: Path) -> dict[str, bytes]:
    """Each tensor's bytes, read by the safetensors library."""
    return {
        name: bytes(found["data"])
        for path in shard_files(root)
        for name, found in safetensors.deserialize(path.read_bytes())
    }


def arena_tensors(plan: Plan, memory: memoryview) -> dict[str, bytes]:
    """Each tensor's bytes as they lie in an arena."""
    return {
        p.name: bytes(memory[p.arena_offset : p.arena_offset + p.nbytes])
        for p in plan.placements.values()
    }


def evict(path: Path) -> None:
    """Drops a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
