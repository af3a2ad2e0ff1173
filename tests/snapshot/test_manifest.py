from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.engine_key import EngineKey
from coldframe.snapshot.gpu_image import GpuImage
from coldframe.snapshot.image_files import PIECE_BYTES, ImageFile, StoredObject
from coldframe.snapshot.libraries import Library
from coldframe.snapshot.manifest import Manifest, Oracle, is_image_id
from tests.snapshot.images import MACHINE, draft

PIECES = ((100, "1" * 64), (2000, "2" * 64))
MACHINE_WITH_FILES = MACHINE._replace(
    libraries=(Library("/lib/libc.so", 10, 20, "build-id:00"),), gpu="NVIDIA H200", driver="580"
)
GPU = GpuImage(
    "13.0", (("GPU-1", "H200"), ("GPU-2", "T4")), 1 << 29, "f" * 32, 1 << 20, 64, ((1, 8), (8, 16))
)
ENGINE = EngineKey("vllm", "vllm 0.32.0 01234567", '{"max_model_len": 1024}')
MANIFEST = Manifest(
    1700000000.5,
    *draft(machine=MACHINE_WITH_FILES)._replace(gpu=GPU, engine=ENGINE),
    objects=(
        StoredObject("3" * 64, "lz4", PIECE_BYTES + 5, PIECES),
        StoredObject("4" * 64, "raw", 7, ((7, "5" * 64),)),
        StoredObject("6" * 64, "raw", 0, ()),
    ),
    files=(
        ImageFile("core-7.img", 3, 1, 0),
        ImageFile("files.img", 4, 1, 3),
        ImageFile("nothing.img", 0, 2, 0),
        ImageFile("pages-1.img", PIECE_BYTES + 5, 0, 0),
    ),
    oracle=Oracle((1, 2), (3, 4), (-0.5, -1.25)),
    signature="7" * 64,
)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in JSON values: each container and each leaf."""
    if path:
        yield path
    if isinstance(value, dict):
        for name, item in value.items():
            yield from paths_in(item, (*path, name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from paths_in(item, (*path, number))


PATHS = list(paths_in(MANIFEST.to_json()))


def test_a_manifest_comes_back_as_it_was() -> None:
    assert Manifest.decode(MANIFEST.encode()) == MANIFEST
    assert Manifest.from_json(json.loads(json.dumps(MANIFEST.to_json()))) == MANIFEST
    plain = MANIFEST._replace(oracle=None, signature=None, machine=MACHINE, engine=None)
    assert Manifest.decode(plain.encode()) == plain
    assert MANIFEST.image_bytes == PIECE_BYTES + 5 + 7
    assert MANIFEST.stored_bytes == 2107


def test_the_id_is_of_all_but_oracle_and_signature() -> None:
    content = MANIFEST.to_json()
    del content["signature"]
    content["oracle"] = None
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert MANIFEST.id == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert is_image_id(MANIFEST.id)
    assert MANIFEST.with_oracle(Oracle((1,), (2,), (0.0,))).id == MANIFEST.id
    assert MANIFEST._replace(signature=None).id == MANIFEST.id
    assert MANIFEST._replace(created=1.0).id != MANIFEST.id


def test_an_oracle_is_taken_as_json_and_ends_the_signature() -> None:
    oracle = {"prompt_ids": [5], "token_ids": [6, 7], "logprobs": [-1, -0.25]}
    finished = MANIFEST.with_oracle(oracle)
    assert finished.oracle == Oracle((5,), (6, 7), (-1, -0.25))
    assert finished.signature is None
    with pytest.raises(SnapshotError, match="oracle, token_ids"):
        MANIFEST.with_oracle({**oracle, "token_ids": ["6"]})


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_missed_where_it_is_not_there_and_refused_where_it_is_of_another_type(
    path: tuple[Any, ...],
) -> None:
    for broken in ({"no": "such"}, [[]], True, "\0", -1.5):
        content = copy.deepcopy(MANIFEST.to_json())
        holder: Any = content
        for step in path[:-1]:
            holder = holder[step]
        if type(holder[path[-1]]) is type(broken) and not isinstance(broken, dict | list):
            continue  # a text may be any text, but for hashes and names
        holder[path[-1]] = broken
        if path == ("created",) and broken == -1.5:
            continue
        if path[:2] == ("oracle", "logprobs") and broken == -1.5:
            continue
        with pytest.raises(SnapshotError) as raised:
            Manifest.from_json(content, "here")
        assert str(raised.value.where).startswith("here, ")
    if isinstance(path[-1], str):
        content = copy.deepcopy(MANIFEST.to_json())
        holder = content
        for step in path[:-1]:
            holder = holder[step]
        del holder[path[-1]]
        with pytest.raises(SnapshotError) as raised:
            Manifest.from_json(content)
        assert path[-1] in str(raised.value.where)


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), VALUES)
@example(("created",), 10**20)
@example(("process", "pid"), 10**20)
@example(("gpu", "graphs", 0, 0), 10**20)
@example(("created",), 1 - (1 << 64))
def test_whatever_a_field_is_it_is_a_manifest_or_an_error_of_ours(
    path: tuple[Any, ...], value: Any
) -> None:
    content = copy.deepcopy(MANIFEST.to_json())
    holder: Any = content
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value
    try:
        found = Manifest.from_json(content)
    except SnapshotError:
        return
    assert Manifest.decode(found.encode()) == found


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(MANIFEST.encode()) - 1), st.integers(0, 255))
def test_a_flipped_byte_is_another_manifest_or_an_error_of_ours(at: int, byte: int) -> None:
    raw = bytearray(MANIFEST.encode())
    if raw[at] == byte:
        return
    raw[at] = byte
    try:
        found = Manifest.decode(bytes(raw))
    except SnapshotError:
        return
    # `1.0` and `1` are one number; anything else shows in the canonical form.
    assert found != MANIFEST or found.encode() == MANIFEST.encode()


def changed(**fields: Any) -> dict[str, Any]:
    return {**MANIFEST.to_json(), **fields}


def objects(number: int, **fields: Any) -> dict[str, Any]:
    content = copy.deepcopy(MANIFEST.to_json())
    content["objects"][number].update(fields)
    return content


def files(number: int, **fields: Any) -> dict[str, Any]:
    content = copy.deepcopy(MANIFEST.to_json())
    content["files"][number].update(fields)
    return content


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (changed(version=2), "version"),
        (changed(more=1), "more"),
        (changed(signature="7" * 63), "signature"),
        (changed(files=MANIFEST.to_json()["files"][::-1]), "files"),
        (changed(files=MANIFEST.to_json()["files"][1:]), "files"),
        (objects(0, digest="g" * 64), "objects[0].digest"),
        (objects(0, codec="zip"), "objects[0].codec"),
        (objects(0, size=PIECE_BYTES), "objects[0].pieces"),
        (objects(0, pieces=[[100, "1" * 64], [0, "2" * 64]]), "objects[0].pieces[1]"),
        (objects(0, pieces=[[100, "1" * 64], [1 << 40, "2" * 64]]), "objects[0].pieces[1]"),
        (objects(0, pieces=[[100, "1" * 64], [True, "2" * 64]]), "objects[0].pieces[1]"),
        (objects(1, pieces=[[8, "5" * 64]]), "objects[1].pieces[0]"),
        (objects(1, size=8, pieces=[[8, "5" * 64]]), "files"),
        (files(0, name="../core.img"), "files[0].name"),
        (files(0, name=".."), "files[0].name"),
        (files(0, name="files.img"), "files"),
        (files(0, object_index=3), "files"),
        (files(1, offset=2), "files"),
        (files(3, offset=1), "files"),
    ],
)
def test_what_cannot_be_is_refused(content: dict[str, Any], field: str) -> None:
    with pytest.raises(SnapshotError) as raised:
        Manifest.from_json(content, "it")
    assert raised.value.where == f"it, {field}"


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"version":1,"version":1}', b"\xff", b"NaN"])
def test_what_is_no_json_object_is_refused(raw: bytes, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError) as raised:
        Manifest.decode(raw, "here")
    assert str(raised.value.where).startswith("here")
