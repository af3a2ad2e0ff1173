"""A whole checkpoint, read from wherever a MODEL is."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.sources.location import parse_location
from coldframe.loader.sources.opening import open_origin
from tests.loader.checkpoints.written import tensor, write_model

__all__ = ["read_model", "sharded_model", "weights_of"]


def sharded_model(root: Path) -> Path:
    """A directory with two shards, larger than what comes with a header."""
    first = [tensor("a", 700_001), tensor("b", 999, 1)]
    return write_model(root, [first, [tensor("c", 600_000, 2)]], {"model_type": "x"})


def weights_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.glob("*.safetensors"))}


def read_model(text: str) -> tuple[Checkpoint, dict[str, bytes]]:
    """The checkpoint, and all bytes of its shards by name, each read in two pieces."""
    with closing(open_origin(parse_location(text))) as origin:
        checkpoint = Checkpoint.open(origin)
        found: dict[str, bytes] = {}
        with closing(origin.open_source(checkpoint.shards)) as source:
            for number, shard in enumerate(checkpoint.shards):
                content = bytearray(shard.size)
                view = memoryview(content)
                half = shard.size // 2
                source.read_into(number, half, [view[half : half + 10], view[half + 10 :]])
                source.read_into(number, 0, [view[:half]])
                found[shard.name] = bytes(content)
            source.finish()
    return checkpoint, found
