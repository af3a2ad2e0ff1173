from __future__ import annotations

import itertools
import os
import random
import tempfile
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.checkpoints.pieces import PIECE_BYTES, cuts_of
from coldframe.loader.disk_cache.file import CacheFile, Scratch

HEADER = 1000


def shard(sizes: list[int], seed: int) -> tuple[bytes, list[tuple[int, int]]]:
    """A file's bytes, and offset and size of its tensors."""
    tensors, at = [], HEADER
    for size in sizes:
        tensors.append((at, size))
        at += size
    return random.Random(seed).randbytes(at), tensors


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3 * PIECE_BYTES // 2), min_size=1, max_size=5),
    marks=st.lists(st.integers(0, 8 * PIECE_BYTES), max_size=12),
    seed=st.integers(0, 1000),
    stays=st.booleans(),
    lost=st.integers(0, 3),
)
def test_bytes_may_come_in_any_order_and_cut(
    sizes: list[int], marks: list[int], seed: int, stays: bool, lost: int
) -> None:
    content, tensors = shard(sizes, seed)
    order = random.Random(seed)
    cuts = cuts_of(HEADER, tensors)
    bounds = sorted({HEADER, len(content), *(m for m in marks if HEADER < m < len(content))})
    stretches = list(itertools.pairwise(bounds))
    order.shuffle(stretches)
    with tempfile.TemporaryDirectory() as root:
        folder = os.open(root, os.O_RDONLY)
        file = CacheFile(folder, "x", cuts, Scratch())
        os.close(folder)
        file.write_header(content[:HEADER])
        for start, stop in stretches[lost:]:
            middle = order.randint(start, stop)
            views = [bytearray(content[start:middle]), bytearray(content[middle:stop])]
            file.take(start, [memoryview(view) for view in views], stays=stays)
            if not stays:  # they are filled anew
                views[0][:] = bytes(len(views[0]))
        missing = list(file.missing())
        if stays and not lost:
            assert missing == []
        for offset, length in missing:
            assert offset in cuts
            assert offset + length in cuts
            part = memoryview(bytearray(content[offset : offset + length]))
            file.take(offset, [part], stays=False)
        pairs = itertools.pairwise(cuts)
        digests = [xxhash.xxh3_128(content[start:stop]).digest() for start, stop in pairs]
        assert file.digests == b"".join(digests)
        file.sync()
        file.close()
        assert Path(root, "x").read_bytes() == content


def test_what_is_missing_has_no_digests(tmp_path: Path) -> None:
    content, tensors = shard([10, 20, 30], 1)
    folder = os.open(tmp_path, os.O_RDONLY)
    file = CacheFile(folder, "x", cuts_of(HEADER, tensors), Scratch())
    os.close(folder)
    data = memoryview(bytearray(content))
    file.take(HEADER + 10, [data[HEADER + 10 : HEADER + 30]], stays=True)
    assert list(file.missing()) == [(HEADER, 10), (HEADER + 30, 30)]
    with pytest.raises(ValueError, match="missing"):
        _ = file.digests
    file.close()


def test_a_piece_of_which_bytes_came_twice_is_missing(tmp_path: Path) -> None:
    content, tensors = shard([100], 1)
    folder = os.open(tmp_path, os.O_RDONLY)
    file = CacheFile(folder, "x", cuts_of(HEADER, tensors), Scratch())
    os.close(folder)
    data = memoryview(bytearray(content))
    file.take(HEADER, [data[HEADER : HEADER + 60]], stays=True)
    file.take(HEADER + 50, [data[HEADER + 50 :]], stays=True)
    assert list(file.missing()) == [(HEADER, 100)]
    file.close()


def test_without_direct_writes(tmp_path: Path) -> None:
    content, tensors = shard([2 * PIECE_BYTES], 1)
    folder = os.open(tmp_path, os.O_RDONLY)
    file = CacheFile(folder, "x", cuts_of(HEADER, tensors), Scratch())
    os.close(folder)
    data = memoryview(bytearray(content))[HEADER:]
    file._close_direct()
    file.take(HEADER, [data], stays=True)
    file.write_header(content[:HEADER])
    assert list(file.missing()) == []
    file.close()
    assert (tmp_path / "x").read_bytes() == content
