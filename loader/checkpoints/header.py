"""The header of a safetensors file, read strictly: no byte of the file goes unexplained.

    8 bytes          n, the length of the header, little endian
    n bytes          JSON: {name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {}}
    to the end       the data; `begin` and `end` count from its first byte

The format and its limits: https://github.com/huggingface/safetensors, version 0.8. Stricter than
upstream on purpose in two places: a repeated name is an error (upstream keeps the last), and so
is a field that the format does not know. This module does no I/O, so that every source of bytes
can use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coldframe.loader.errors import CheckpointError
from coldframe.loader.strict_json import describe, parse_object

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER_BYTES",
    "PREFIX_BYTES",
    "TensorInfo",
    "header_bytes",
    "parse_header",
]

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # upstream's limit

# Bits an element. F4 and F6 are packed: the tensor as a whole must end on a byte.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_FIELDS = frozenset(("dtype", "shape", "data_offsets"))
_MAX_SIZE = 2**63 - 1  # what a file offset and a tensor dimension can hold
_HINT = "Download or save the file again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name in the header.
        dtype: The name that safetensors gives its element type, as in `BF16`.
        shape: Its dimensions; `()` is a scalar.
        shard: The index of its shard in `Checkpoint.shards`.
        offset: The position of its first byte in the file, from the start of the file.
        nbytes: Its size in bytes; 0 when a dimension is 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


def header_bytes(prefix: bytes, *, file_size: int, where: str) -> int:
    """The length of the header that follows a file's first 8 bytes.

    Args:
        prefix: The first 8 bytes, or what there is of them.
        file_size: The size of the whole file in bytes.
        where: The file, for the error.

    Raises:
        CheckpointError: There are no 8 bytes, or the length is over the limit or the file.
    """
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(
            "the file ends before its header begins",
            where=where,
            expected="at least 8 bytes",
            got=f"{len(prefix)} bytes",
            hint=_HINT,
        )
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            "the header is too long",
            where=where,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            got=f"{length} bytes",
            hint="This is not a safetensors file, or it is damaged. " + _HINT,
        )
    if PREFIX_BYTES + length > file_size:
        raise CheckpointError(
            "the header is cut",
            where=where,
            expected=f"{PREFIX_BYTES + length} bytes",
            got=f"a file of {file_size} bytes",
            hint=_HINT,
        )
    return length


def parse_header(raw: bytes, *, file_size: int, where: str, shard: int = 0) -> list[TensorInfo]:
    """Read a header, and hold it against the size of its file.

    Args:
        raw: The header, without the 8 bytes before it.
        file_size: The size of the whole file in bytes.
        where: The file, for the error.
        shard: What to put in `TensorInfo.shard`.

    Returns:
        The tensors in the order of their data. Together they cover the file to its last byte.

    Raises:
        CheckpointError: The header is not sound, or does not describe a file of this size.
    """
    parsed = parse_object(raw, where=where, hint=_HINT)
    _check_metadata(parsed.pop("__metadata__", None), where)
    data_offset = PREFIX_BYTES + len(raw)
    tensors = [
        _tensor(name, entry, shard, data_offset, f"{where}, tensor {describe(name)}")
        for name, entry in parsed.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(tensors, data_offset, file_size, where)
    return tensors


def _check_metadata(metadata: object, where: str) -> None:
    # Upstream takes null for none at all.
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            "__metadata__ is not a map of text to text",
            where=where,
            got=describe(metadata),
            hint=_HINT,
        )


def _tensor(name: str, entry: Any, shard: int, data_offset: int, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        got = describe(sorted(entry)) if isinstance(entry, dict) else describe(entry)
        raise CheckpointError(
            "a tensor's entry is malformed",
            where=where,
            expected="dtype, shape and data_offsets",
            got=got,
            hint=_HINT,
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(
            "unknown dtype",
            where=where,
            expected="one of " + ", ".join(DTYPE_BITS),
            got=describe(dtype),
            hint="Convert the tensor to one of these.",
        )
    if not _is_sizes(shape):
        raise CheckpointError(
            "a shape is malformed",
            where=where,
            expected="a list of sizes, each from 0 to 2^63-1",
            got=describe(shape),
            hint=_HINT,
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            "data_offsets are malformed",
            where=where,
            expected="[begin, end] with 0 <= begin <= end",
            got=describe(offsets),
            hint=_HINT,
        )
    begin, end = offsets
    nbytes = _bytes_of(dtype, bits, shape, where)
    if nbytes != end - begin:
        raise CheckpointError(
            "dtype and shape do not match the byte count",
            where=where,
            expected=f"{nbytes} bytes for {dtype} {describe(shape)}",
            got=f"{end - begin} bytes at [{begin}, {end}]",
            hint=_HINT,
        )
    return TensorInfo(name, dtype, tuple(shape), shard, data_offset + begin, nbytes)


def _is_sizes(value: object) -> bool:
    # `type is int`, because a bool is an instance of int.
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _MAX_SIZE for item in value
    )


def _bytes_of(dtype: str, bits: int, shape: list[int], where: str) -> int:
    elements = 1
    for size in shape:
        elements *= size
        if elements > _MAX_SIZE // bits:
            raise CheckpointError(
                "the shape overflows",
                where=where,
                expected="a tensor of less than 2^63 bits",
                got=describe(shape),
                hint=_HINT,
            )
    if elements * bits % 8:
        raise CheckpointError(
            "a packed tensor does not end on a byte",
            where=where,
            expected="a multiple of 8 bits",
            got=f"{elements} elements of {dtype}, {bits} bits each",
            hint=_HINT,
        )
    return elements * bits // 8


def _check_cover(tensors: list[TensorInfo], data_offset: int, file_size: int, where: str) -> None:
    """Each tensor begins where the one before it ends, and the last ends with the file."""
    end, before = data_offset, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                "tensors overlap" if tensor.offset < end else "there is a hole between tensors",
                where=f"{where}, tensor {describe(tensor.name)}",
                expected=f"data from byte {end - data_offset}, where {before} ends",
                got=f"byte {tensor.offset - data_offset}",
                hint=_HINT,
            )
        end, before = end + tensor.nbytes, f"tensor {describe(tensor.name)}"
        if end > file_size:
            raise CheckpointError(
                "the file is shorter than its header says",
                where=f"{where}, tensor {describe(tensor.name)}",
                expected=f"at least {end} bytes",
                got=f"a file of {file_size} bytes",
                hint=_HINT,
            )
    if end != file_size:
        raise CheckpointError(
            "the file is longer than its header says",
            where=where,
            expected=f"{end} bytes",
            got=f"a file of {file_size} bytes",
            hint=_HINT,
        )
