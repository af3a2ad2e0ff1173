"""Write one safetensors file whose data starts on a cache line.

The usual writers pad the header to 8 bytes only. Weights that are mapped in place then straddle
cache lines, and a batch-1 bf16 linear over them runs about a third slower. The format allows any
number of spaces behind the header's JSON, so the data can start where the processor likes it.

This module only lays bytes out: dtypes go by the format's names, and a tensor is filled by
anything that has a buffer. It imports neither torch nor numpy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from coldframe.loader.checkpoints.header import DTYPE_BITS

__all__ = ["ALIGNMENT", "TensorEntry", "encode_header", "write_safetensors"]

ALIGNMENT = 64
"""The data section starts on a multiple of this, in bytes: a cache line, an AVX-512 register."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as the header describes it.

    Args:
        name: Its name in the checkpoint.
        dtype: A key of `DTYPE_BITS`.
        shape: Its shape, row-major.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def encode_header(
    entries: Sequence[TensorEntry], metadata: Mapping[str, str], alignment: int = ALIGNMENT
) -> bytes:
    """Everything in front of the data: the length, the JSON and the padding.

    The layout is that of https://github.com/huggingface/safetensors#format.

    Args:
        entries: The tensors, in the order of their data; no holes between them.
        metadata: Goes under `__metadata__`; Transformers expects `{"format": "pt"}`.
        alignment: The data starts on a multiple of this, in bytes.

    Returns:
        Bytes whose number is a multiple of `alignment`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // alignment) * alignment - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def write_safetensors(
    path: Path,
    entries: Sequence[TensorEntry],
    buffers: Iterable[memoryview],
    metadata: Mapping[str, str],
) -> int:
    """Write a file, one tensor at a time.

    Args:
        path: The file; it must not exist yet.
        entries: The tensors, in the order of their data.
        buffers: Their bytes in the same order, little-endian and row-major. Each is let go before
            the next is asked for, so a generator keeps one tensor in memory.
        metadata: See `encode_header`.

    Returns:
        The size of the file in bytes.

    Raises:
        ValueError: A buffer is not as long as its entry says, or there are too few or too many.
        OSError: The file could not be written.
    """
    header = encode_header(entries, metadata)
    with path.open("xb") as file:
        file.write(header)
        for entry, buffer in zip(entries, buffers, strict=True):
            if buffer.nbytes != entry.nbytes:
                raise ValueError(f"{entry.name}: {buffer.nbytes} bytes instead of {entry.nbytes}")
            file.write(buffer)
    return len(header) + sum(entry.nbytes for entry in entries)
