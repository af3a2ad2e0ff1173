from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.checkpoints.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorInfo,
    header_bytes,
    parse_header,
)
from coldframe.loader.errors import CheckpointError
from tests.loader.checkpoints.written import header_of, tensor

Found = dict[str, tuple[str, tuple[int, ...], bytes]]

ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def ours(raw: bytes) -> Found:
    length = header_bytes(raw[:8], file_size=len(raw), where="a.safetensors")
    found = parse_header(raw[8 : 8 + length], file_size=len(raw), where="a.safetensors")
    return {t.name: (t.dtype, t.shape, raw[t.offset : t.offset + t.nbytes]) for t in found}


def upstream(raw: bytes) -> Found:
    """What safetensors itself makes of the same bytes."""
    return {
        name: (found["dtype"], tuple(found["shape"]), bytes(found["data"]))
        for name, found in safetensors.deserialize(raw)
    }


def file_of(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def refused(header: object, data: bytes = b"") -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        ours(file_of(header, data))
    error = caught.value
    assert "a.safetensors" in str(error.where)
    assert error.hint
    return error


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_upstreams_size(dtype: str) -> None:
    size = DTYPE_BITS[dtype]
    entry = {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}
    raw = file_of({"a": entry}, bytes(range(size)))
    assert ours(raw) == upstream(raw)


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({}, b""),
        ({"__metadata__": {"format": "pt"}, "a": ENTRY}, b"1234"),
        ({"__metadata__": None, "a": ENTRY}, b"1234"),
        ({"": {"dtype": "BOOL", "shape": [], "data_offsets": [0, 1]}}, b"1"),
        ({"a": {"dtype": "F64", "shape": [3, 0], "data_offsets": [0, 0]}}, b""),
        ({"b": ENTRY, "a": {**ENTRY, "data_offsets": [4, 8]}}, b"12345678"),
        ({"b": {**ENTRY, "data_offsets": [4, 8]}, "a": ENTRY}, b"12345678"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   \n\t', b"1234"),
        (json.dumps({"\u00e4\U0001f331": ENTRY}).encode(), b"1234"),
        (json.dumps({"\u00e4\U0001f331": ENTRY}, ensure_ascii=False).encode(), b"1234"),
    ],
)
def test_sound_files_read_as_upstream_reads_them(header: object, data: bytes) -> None:
    raw = file_of(header, data)
    assert ours(raw) == upstream(raw)


def test_offsets_are_those_of_the_file() -> None:
    tensors = [tensor("b", 5), tensor("a", 3), tensor("empty", 0)]
    raw = json.dumps(header_of(tensors)).encode()
    start = 8 + len(raw)
    assert parse_header(raw, file_size=start + 8, where="x", shard=7) == [
        TensorInfo("b", "U8", (5,), 7, start, 5),
        TensorInfo("a", "U8", (3,), 7, start + 5, 3),
        TensorInfo("empty", "U8", (0,), 7, start + 8, 0),
    ]


@pytest.mark.parametrize(
    ("raw", "what", "got"),
    [
        (b"", "the file ends before its header begins", "0 bytes"),
        (b"1234567", "the file ends before its header begins", "7 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "the header is cut", "a file of 10 bytes"),
        (
            (MAX_HEADER_BYTES + 1).to_bytes(8, "little"),
            "the header is too long",
            "100000001 bytes",
        ),
        (b"\xff" * 8, "the header is too long", f"{2**64 - 1} bytes"),
        (bytes(8), "this is not JSON", "Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_a_length_that_cannot_be_is_refused(raw: bytes, what: str, got: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        upstream(raw)
    with pytest.raises(CheckpointError) as caught:
        ours(raw)
    assert (caught.value.what, caught.value.got) == (what, got)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"{", "this is not JSON"),
        (b'{"a": 1} x', "this is not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "this is not JSON"),
        (b'{"\xff": 1}', "this is not JSON"),
        (b'{"a": NaN}', "this is not JSON"),
        (b'{"__metadata__": {"a": "\\ud800"}}', "this is not JSON"),
        (b"[]", "this is not a JSON object"),
        (b'{"a":' + b"[" * 100_000, "the JSON is nested too deeply"),
        ({"__metadata__": {"a": 1}}, "__metadata__ is not a map of text to text"),
        ({"__metadata__": []}, "__metadata__ is not a map of text to text"),
    ],
)
def test_a_header_that_is_no_header_is_refused(header: object, what: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        upstream(file_of(header))
    assert refused(header).what == what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": "F33"}, "unknown dtype"),
        ({"dtype": 1}, "unknown dtype"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"shape": 1}, "a shape is malformed"),
        ({"shape": [True]}, "a shape is malformed"),
        ({"shape": [1.0]}, "a shape is malformed"),
        ({"shape": [-1]}, "a shape is malformed"),
        ({"shape": ["1"]}, "a shape is malformed"),
        ({"shape": [10**30]}, "a shape is malformed"),
        ({"shape": [2**40, 2**40]}, "the shape overflows"),
        ({"shape": [2**40, 2**40, 0]}, "the shape overflows"),
        ({"shape": [2]}, "dtype and shape do not match the byte count"),
        ({"dtype": "F4", "shape": [3]}, "a packed tensor does not end on a byte"),
        ({"data_offsets": [0]}, "data_offsets are malformed"),
        ({"data_offsets": [0, 4, 4]}, "data_offsets are malformed"),
        ({"data_offsets": [4, 0]}, "data_offsets are malformed"),
        ({"data_offsets": [-4, 0]}, "data_offsets are malformed"),
        ({"data_offsets": [False, 4]}, "data_offsets are malformed"),
        ({"data_offsets": None}, "data_offsets are malformed"),
        ({"data_offsets": [2, 6]}, "there is a hole between tensors"),
    ],
)
def test_an_entry_that_is_wrong_is_refused(change: dict[str, Any], what: str) -> None:
    header = {"a": {**ENTRY, **change}}
    with pytest.raises(safetensors.SafetensorError):
        upstream(file_of(header, b"1234"))
    error = refused(header, b"1234")
    assert error.what == what
    assert "tensor 'a'" in str(error.where)
    assert error.expected
    assert error.got


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_an_entry_with_a_field_missing_is_refused(field: str) -> None:
    header = {"a": {k: v for k, v in ENTRY.items() if k != field}}
    with pytest.raises(safetensors.SafetensorError):
        upstream(file_of(header, b"1234"))
    assert refused(header, b"1234").what == "a tensor's entry is malformed"


@pytest.mark.parametrize(
    ("second", "data", "what", "expected", "got"),
    [
        ([2, 6], 6, "tensors overlap", "data from byte 4, where tensor 'a' ends", "byte 2"),
        ([0, 4], 4, "tensors overlap", "data from byte 4, where tensor 'a' ends", "byte 0"),
        (
            *([5, 9], 9, "there is a hole between tensors"),
            *("data from byte 4, where tensor 'a' ends", "byte 5"),
        ),
        (
            *([4, 8], 7, "the file is shorter than its header says"),
            *("at least 138 bytes", "a file of 137 bytes"),
        ),
        (
            *([4, 8], 9, "the file is longer than its header says"),
            *("138 bytes", "a file of 139 bytes"),
        ),
    ],
)
def test_data_that_is_not_covered_once_is_refused(
    second: list[int], data: int, what: str, expected: str, got: str
) -> None:
    header = {"a": ENTRY, "b": {**ENTRY, "data_offsets": second}}
    with pytest.raises(safetensors.SafetensorError):
        upstream(file_of(header, bytes(data)))
    error = refused(header, bytes(data))
    assert (error.what, error.expected, error.got) == (what, expected, got)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
            "a key appears twice",
        ),
        (
            b'{"__metadata__":{"k":"1","k":"2"},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            "a key appears twice",
        ),
        ({"a": {**ENTRY, "strides": [1]}}, "a tensor's entry is malformed"),
        (b'{"a":["F32",[1],[0,4]]}', "a tensor's entry is malformed"),
        (
            {"a": ENTRY, "b": {"dtype": "U8", "shape": [0, 2**63], "data_offsets": [4, 4]}},
            "a shape is malformed",
        ),
    ],
)
def test_what_upstream_takes_and_we_refuse_on_purpose(header: object, what: str) -> None:
    assert upstream(file_of(header, b"1234"))
    assert refused(header, b"1234").what == what


def test_an_error_stays_short_whatever_is_in_the_file() -> None:
    header = {"n" * 10_000: {"dtype": "d" * 10_000, "shape": [1] * 10_000, "data_offsets": [0, 4]}}
    assert len(str(refused(header, b"1234"))) < 1000


# What we may say of a header that upstream takes.
_STRICTER = {
    "a key appears twice",
    "a tensor's entry is malformed",
    "unknown dtype",  # upstream also takes {"F32": null}
    "a shape is malformed",
    "this is not JSON",  # in a field that upstream does not look at
    "the JSON is nested too deeply",
}

_TENSORS = [tensor("w.a", 12), ("w.b", "BF16", [2, 2], b"12345678"), tensor("w.c", 0)]
_HEADER = json.dumps({"__metadata__": {"format": "pt"}, **header_of(_TENSORS)}).encode()
_DATA = b"".join(t[3] for t in _TENSORS)
_TOKENS = [
    *(b'" { } [ ] : , - . 0 1 2 9 e \\ \x00 \xff \\ud800 -0 1e3 0x1 00 NaN null true'.split()),
    *(b'"w.a" "w.b" "dtype" "shape" "data_offsets" "U8" "BF16" "F4" "F64" "BOOL" [] {}'.split()),
    b" ",
    b"\n",
    b"18446744073709551616",
    b"9223372036854775807",
]
_EDIT = st.tuples(
    st.integers(0, len(_HEADER)),
    st.integers(0, 12),
    st.one_of(st.sampled_from(_TOKENS), st.binary(max_size=3)),
)


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    edits=st.lists(_EDIT, max_size=4),
    length_error=st.sampled_from([0, 0, 0, 0, 1, -1, 1 << 40]),
    data_error=st.sampled_from([0, 0, 0, 0, 1, -1]),
)
def test_a_damaged_header_reads_as_upstream_reads_it_or_is_refused(
    edits: list[tuple[int, int, bytes]], length_error: int, data_error: int
) -> None:
    header = _HEADER
    for at, cut, put in edits:
        header = header[:at] + put + header[at + cut :]
    data = (_DATA + b"x")[: len(_DATA) + data_error]
    raw = max(0, len(header) + length_error).to_bytes(8, "little") + header + data
    found, refusal = _either(ours, raw)
    theirs, _ = _either(upstream, raw)
    if found is not None:
        assert found == theirs
    elif theirs is not None:
        assert refusal in _STRICTER


def _either(read: Callable[[bytes], Found], raw: bytes) -> tuple[Found | None, str | None]:
    try:
        return read(raw), None
    except CheckpointError as error:
        return None, error.what
    except safetensors.SafetensorError as error:
        return None, str(error)


def test_files_of_the_safetensors_library_read_alike(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        f"{dtype}".removeprefix("torch.") + suffix: torch.zeros(shape, dtype=dtype)
        for dtype in (
            *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
            *(torch.float8_e4m3fn, torch.float8_e5m2),
        )
        for suffix, shape in (("", (3, 5)), (".empty", (0, 4)), (".scalar", ()))
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    assert ours(raw) == upstream(raw)
    assert ours(raw).keys() == tensors.keys()
