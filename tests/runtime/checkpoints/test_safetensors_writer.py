"""Our safetensors files, read by the safetensors library."""

from __future__ import annotations

import json
from array import array
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from coldframe.runtime.checkpoints.safetensors_writer import (
    ALIGNMENT,
    TensorEntry,
    encode_header,
    write_safetensors,
)

ENTRIES = [TensorEntry("b", "F32", (2, 3)), TensorEntry("a", "BF16", (4,))]
BUFFERS = [memoryview(array("f", range(6))).cast("B"), memoryview(bytes([0x80, 0x3F] * 4))]


def test_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert write_safetensors(path, ENTRIES, BUFFERS, {"format": "pt"}) == path.stat().st_size
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").equal(torch.arange(6.0).reshape(2, 3))
        assert file.get_tensor("a").equal(torch.ones(4, dtype=torch.bfloat16))


@pytest.mark.parametrize("length", range(130))
def test_data_starts_on_a_cache_line(length: int) -> None:
    header = encode_header([TensorEntry("x" * length, "F16", (1,))], {})
    assert len(header) % ALIGNMENT == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert header[8:9] == b"{"
    assert list(json.loads(header[8:])) == ["__metadata__", "x" * length]


def test_wrong_sizes_and_an_existing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="b: 8 bytes instead of 24"):
        write_safetensors(tmp_path / "1", ENTRIES, BUFFERS[::-1], {})
    with pytest.raises(ValueError, match="shorter"):
        write_safetensors(tmp_path / "2", ENTRIES, BUFFERS[:1], {})
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "2", ENTRIES, BUFFERS, {})
