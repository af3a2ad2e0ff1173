"""Seals, against hashes that are taken here from what the safetensors library reads."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from coldframe.loader.checkpoints.checkpoint import Checkpoint
from coldframe.loader.checkpoints.pieces import PieceHasher, Pieces, cuts_of, hash_package, split
from coldframe.loader.checkpoints.seal import SEAL_NAME, Seal, SealedShard
from coldframe.loader.checkpoints.sealing import seal_checkpoint
from coldframe.loader.errors import (
    CheckpointError,
    ColdframeError,
    PlatformError,
    SourceChanged,
    SourceCorrupt,
)
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.sources.file import FileSource
from tests.loader.checkpoints.written import tensor, write_model
from tests.loader.weights import evict, layered, shard_files
from tests.support import unavailable

MIB = 1 << 20


def sealed(root: Path) -> Seal:
    checkpoint = Checkpoint.open(root, sealed=False)
    source = FileSource(checkpoint.shards)
    try:
        return seal_checkpoint(checkpoint, DirectoryOrigin(str(root)), source)
    finally:
        source.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered(tmp_path_factory.mktemp("large") / "m", nbytes=3 * MIB + 5)


# -- pieces -----------------------------------------------------------------------------------

sizes = st.lists(st.sampled_from([0, 1, 7, MIB - 1, MIB, MIB + 1, 3 * MIB + 5]), max_size=8)


@given(data_offset=st.integers(8, 3 * MIB), sizes=sizes)
@settings(deadline=None)
def test_pieces_cover_the_data_and_straddle_nothing(data_offset: int, sizes: list[int]) -> None:
    spans, end = [], data_offset
    for size in sizes:
        spans.append((end, size))
        end += size
    cuts = list(cuts_of(data_offset, spans))
    assert cuts[0] == data_offset
    assert cuts[-1] == end
    assert cuts == sorted(set(cuts))
    starts = {start for start, size in spans if size}
    # Each tensor's start, each multiple, and nothing else.
    multiples = {at for at in range(0, end, MIB) if at > data_offset}
    assert set(cuts[:-1]) == starts | multiples


@given(
    data=st.binary(min_size=1, max_size=60),
    inner=st.sets(st.integers(1, 59), max_size=8),
    walls=st.lists(st.integers(0, 60), max_size=8),
)
def test_split_finds_each_piece_in_any_buffers(
    data: bytes, inner: set[int], walls: list[int]
) -> None:
    cuts = sorted({0, len(data), *(cut for cut in inner if cut < len(data))})
    edges = sorted([0, len(data), *(wall for wall in walls if wall <= len(data))])
    # Repeated edges make empty buffers.
    parts = [memoryview(data)[a:b] for a, b in itertools.pairwise(edges)]
    shifted = [cut + 1000 for cut in cuts]
    found = [b"".join(views) for views in split(parts, shifted)]
    assert found == [data[a:b] for a, b in itertools.pairwise(cuts)]


def test_the_pieces_that_a_stretch_touches() -> None:
    pieces = Pieces(cuts_of(100, [(100, 10), (110, 5), (115, 1)]), b"")
    assert len(pieces) == 3
    assert pieces.covering(100, 116) == range(3)
    assert pieces.covering(109, 110) == range(1)
    assert pieces.covering(109, 111) == range(2)
    assert pieces.covering(114, 116) == range(1, 3)
    for start, stop in ((99, 105), (100, 117), (0, 8)):
        with pytest.raises(ValueError, match="not all data"):
            pieces.covering(start, stop)


@pytest.mark.parametrize("step", [1, 999, MIB, 5 * MIB])
def test_a_hasher_that_is_fed_anyhow(step: int) -> None:
    size = 2 * MIB + 77 if step > 1 else 3000
    data = bytes(i * 7 % 251 for i in range(size))
    cuts = cuts_of(4096, [(4096, size - 100), (4096 + size - 100, 100)])
    hasher = PieceHasher(cuts)
    for at in range(0, size, step):
        hasher.update(memoryview(data)[at : at + step])
    assert bytes(hasher.digests) == b"".join(
        xxhash.xxh3_128_digest(data[a - 4096 : b - 4096]) for a, b in itertools.pairwise(cuts)
    )


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(PlatformError) as caught:
        hash_package()
    assert "pip install xxhash" in caught.value.hint


# -- what is sealed ---------------------------------------------------------------------------


def expected_pieces(path: Path) -> bytes:
    """The hashes of a shard's pieces, from the bytes that the safetensors library finds."""
    raw = path.read_bytes()
    at = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:at])
    data = {name: bytes(found["data"]) for name, found in safetensors.deserialize(raw)}
    digests = []
    for name in sorted(data, key=lambda name: tuple(header[name]["data_offsets"])):
        rest = data[name]
        while rest:
            count = min(len(rest), MIB - at % MIB)
            digests.append(xxhash.xxh3_128_digest(rest[:count]))
            rest, at = rest[count:], at + count
    return b"".join(digests)


@pytest.mark.parametrize("direct", [False, True])
def test_the_hashes_are_those_of_the_tensors(large: Path, direct: bool) -> None:
    checkpoint = Checkpoint.open(large)
    source = FileSource(checkpoint.shards)
    done: list[int] = []
    try:
        if direct:
            for path in shard_files(large):
                evict(path)
            if not source.use_direct():
                unavailable("this file system has no O_DIRECT")
        seal = seal_checkpoint(checkpoint, DirectoryOrigin(str(large)), source, done.append)
    finally:
        source.close()
    assert seal.config == hashlib.sha256((large / "config.json").read_bytes()).hexdigest()
    assert [shard.name for shard in seal.shards] == [path.name for path in shard_files(large)]
    for shard, path in zip(seal.shards, shard_files(large), strict=True):
        raw = path.read_bytes()
        header = raw[: 8 + int.from_bytes(raw[:8], "little")]
        assert shard.size == len(raw)
        assert shard.header == hashlib.sha256(header).hexdigest()
        assert shard.pieces == expected_pieces(path)
    assert done == sorted(done)
    assert done[-1] == sum(tensor.nbytes for tensor in checkpoint.tensors.values())


def test_shards_without_data(tmp_path: Path) -> None:
    root = write_model(tmp_path / "m", [[tensor("a", 0)], [tensor("b", 5), tensor("c", 0)]])
    seal = sealed(root)
    assert [len(shard.pieces) for shard in seal.shards] == [0, 16]
    assert [len(found) for found in seal.pieces_of(Checkpoint.open(root))] == [0, 1]


def test_a_file_that_changes_meanwhile_is_not_sealed(tmp_path: Path) -> None:
    root = layered(tmp_path / "m")
    checkpoint = Checkpoint.open(root)
    source = FileSource(checkpoint.shards)
    try:
        os.utime(shard_files(root)[0], ns=(1, 1))
        with pytest.raises(SourceChanged):
            seal_checkpoint(checkpoint, DirectoryOrigin(str(root)), source)
    finally:
        source.close()


# -- the document -----------------------------------------------------------------------------


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    root = layered(tmp_path / "m")
    origin = DirectoryOrigin(str(root))
    assert Seal.read(origin) is None
    seal = sealed(root)
    before = set(os.listdir(root))
    old = os.umask(0o027)
    try:
        assert seal.write(str(root)) == str(root / SEAL_NAME)
    finally:
        os.umask(old)
    assert set(os.listdir(root)) == before | {SEAL_NAME}
    assert stat.S_IMODE((root / SEAL_NAME).stat().st_mode) == 0o640
    assert Seal.read(origin) == seal
    # Written by hand it is the same seal: what counts is what it says.
    document = json.loads((root / SEAL_NAME).read_bytes())
    again = Seal.parse(json.dumps(document, indent=7).encode(), where="x")
    assert again.digest == seal.digest


def test_the_digest_tells_weights_apart(tmp_path: Path) -> None:
    root = layered(tmp_path / "m")
    digests = {sealed(root).digest}
    path = shard_files(root)[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    digests.add(sealed(root).digest)
    (root / "config.json").write_text('{"a": 1}')
    digests.add(sealed(root).digest)
    assert len(digests) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_a_seal_that_cannot_be_written(tmp_path: Path) -> None:
    seal = sealed(layered(tmp_path / "m"))
    with pytest.raises(PlatformError, match="cannot be written") as caught:
        seal.write(str(tmp_path / "nowhere"))
    assert caught.value.where == str(tmp_path / "nowhere" / SEAL_NAME)


Change = Callable[[dict[str, Any]], object]


def shard_with(**values: object) -> Change:
    return lambda document: document["shards"][0].update(values)


def top_with(**values: object) -> Change:
    return lambda document: document.update(values)


MALFORMED: dict[str, tuple[Change, str]] = {
    "another version": (top_with(version=2), "another version"),
    "a version that is no number": (top_with(version=True), "another version"),
    "no version": (lambda d: d.pop("version"), "another version"),
    "another hash": (top_with(algorithm="crc32"), "not of the kind"),
    "other pieces": (top_with(piece_bytes=1 << 21), "not of the kind"),
    "one key more": (top_with(note="hello"), "malformed"),
    "one key less": (lambda d: d.pop("config"), "malformed"),
    "no shards": (top_with(shards=[]), "malformed"),
    "shards that are no list": (top_with(shards={"a": 1}), "malformed"),
    "a shard that is no object": (top_with(shards=[3]), "malformed"),
    "a shard with a key more": (shard_with(note=1), "malformed"),
    "a shard with a key less": (lambda d: d["shards"][0].pop("size"), "malformed"),
    "a name that is none": (shard_with(name=None), "malformed"),
    "a name twice": (lambda d: d["shards"].append(d["shards"][-1]), "malformed"),
    "the order": (lambda d: d["shards"].reverse(), "malformed"),
    "a size below zero": (shard_with(size=-1), "malformed"),
    "a size that is no number": (shard_with(size=True), "malformed"),
    "a header of other length": (shard_with(header="ab"), "malformed"),
    "a header that is no hash": (shard_with(header="x" * 64), "malformed"),
    "a config that is no hash": (top_with(config=7), "malformed"),
    "pieces that are no base64": (shard_with(pieces="#" * 24), "malformed"),
    "pieces that are no text": (shard_with(pieces=[1]), "malformed"),
    "pieces that are not ASCII": (shard_with(pieces="ä" * 24), "malformed"),
    "half a piece": (
        shard_with(pieces=base64.b64encode(bytes(24)).decode()),
        "malformed",
    ),
}


@pytest.mark.parametrize(("change", "what"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_seal_is_refused(tmp_path: Path, change: Change, what: str) -> None:
    root = layered(tmp_path / "m")
    document = json.loads(sealed(root).encode())
    change(document)
    (root / SEAL_NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=what) as caught:
        Seal.read(DirectoryOrigin(str(root)))
    assert caught.value.where == str(root / SEAL_NAME)
    assert "coldframe seal" in caught.value.hint


@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"[]", b'{"version": 1, "version": 1}', b"{" * 99999]
)
def test_what_is_no_document_at_all(raw: bytes) -> None:
    with pytest.raises(CheckpointError):
        Seal.parse(raw, where="s")


@given(cut=st.integers(0, 400), byte=st.binary(max_size=3))
def test_a_damaged_document_is_an_error_of_ours_or_a_whole_seal(cut: int, byte: bytes) -> None:
    shard = SealedShard("a.safetensors", 9, "1" * 64, bytes(16))
    raw = Seal("0" * 64, (shard,)).encode()
    try:
        found = Seal.parse(raw[:cut] + byte + raw[cut + 1 :], where="s")
    except ColdframeError:
        return
    assert Seal.parse(found.encode(), where="s") == found


# -- a seal and another checkpoint ------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "m"
    write_model(root, [[tensor("a", 100), tensor("b", 50)], [tensor("c", 70)]])
    return root


def test_a_model_that_was_changed_since(model: Path) -> None:
    seal = sealed(model)
    changes: list[list[list[Any]]] = [
        [[tensor("a", 100), tensor("b", 51)], [tensor("c", 70)]],  # a size
        [[tensor("a", 100), tensor("b", 50), tensor("c", 70)]],  # one file
        [[tensor("a", 100)], [tensor("b", 50)], [tensor("c", 70)]],  # three
        [[tensor("a", 150), tensor("b", 0)], [tensor("c", 70)]],  # as large, but cut otherwise
    ]
    for shards in changes:
        for path in shard_files(model):
            path.unlink()
        write_model(model, shards)
        with pytest.raises(CheckpointError, match="sealed before it was changed") as caught:
            seal.pieces_of(Checkpoint.open(model))
        assert str(model) in str(caught.value.where)
        assert caught.value.expected != caught.value.got


def test_another_config_or_header(model: Path) -> None:
    seal = sealed(model)
    config = (model / "config.json").read_bytes()
    seal.check_config(config, where="c")
    with pytest.raises(SourceCorrupt, match="config") as caught:
        seal.check_config(config + b" ", where="c")
    assert caught.value.where == "c"
    assert "seal the model again" in caught.value.hint
    shard = Checkpoint.open(model).shards[0]
    header = (model / shard.name).read_bytes()[: shard.data_offset]
    seal.check_header(shard.name, header, where="h")
    # Names that have changed places leave the pieces as they were; but the header tells.
    swapped = header.replace(b'"a"', b'"x"').replace(b'"b"', b'"a"').replace(b'"x"', b'"b"')
    with pytest.raises(SourceCorrupt, match="header"):
        seal.check_header(shard.name, swapped, where="h")
    with pytest.raises(CheckpointError, match="sealed before it was changed"):
        seal.check_header("other.safetensors", header, where="h")
