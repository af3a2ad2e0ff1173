"""Checkpoints written byte by byte, so that they can also be written wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# name, dtype, shape, data
Tensor = tuple[str, str, list[int], bytes]


def tensor(name: str, nbytes: int, seed: int = 0) -> Tensor:
    """A tensor of bytes that differ from place to place and from seed to seed."""
    return name, "U8", [nbytes], bytes((seed * 101 + i * 7 + 1) % 251 for i in range(nbytes))


def header_of(tensors: Iterable[Tensor]) -> dict[str, Any]:
    header, end = {}, 0
    for name, dtype, shape, data in tensors:
        offsets = [end, end + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        end = offsets[1]
    return header


def write_shard(path: Path, header: dict[str, Any] | str | bytes, data: bytes = b"") -> None:
    """A safetensors file with exactly this header, sound or not."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def write_model(
    root: Path, shards: list[list[Tensor]], config: dict[str, Any] | None = None
) -> Path:
    """A sound model directory; one shard makes a single file, more make an index."""
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(config or {}))
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        count = len(shards)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        weight_map = {t[0]: n for n, shard in zip(names, shards, strict=True) for t in shard}
        write_index(root, weight_map)
    for name, shard in zip(names, shards, strict=True):
        write_shard(root / name, header_of(shard), b"".join(t[3] for t in shard))
    return root


def write_index(root: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
