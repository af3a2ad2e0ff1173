"""Compiled code as files: what is damaged, foreign or for something else is not taken."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from coldframe.loader.errors import SnapshotError
from coldframe.runtime.code_folder import (
    CodeFile,
    CodeFolder,
    SizedFiles,
    cache_root,
    cached,
    key_of,
)
from coldframe.runtime.code_loading import load_code, load_library
from coldframe.runtime.compiler import GAIN, worth_keeping
from coldframe.runtime.engine.code_shape import CodeShape

SHAPE = CodeShape("BF16", "BF16", 8, 16, 2, 1, 4, 32, 1e-5, False, False, False, False, 2)


@pytest.fixture
def folder(tmp_path: Path) -> CodeFolder:
    """A folder as the compiler leaves it, but for what is in its libraries."""
    path = tmp_path / "code"
    path.mkdir(0o700)
    for name in ("layer-1.so", "logits-1.so"):
        (path / name).write_bytes(name.encode())
    files = (CodeFile.of(str(path), name) for name in ("layer-1.so", "logits-1.so"))
    written = CodeFolder(str(path), SHAPE, (SizedFiles(1, *files, 1.5),), "1: 1.50 x eager")
    written.write()
    return written


def test_what_is_written_is_read(folder: CodeFolder) -> None:
    assert CodeFolder.read(folder.path) == folder
    assert folder.bytes_of(folder.sizes[0].layer) == b"layer-1.so"
    assert cached(os.path.dirname(folder.path), "code") == folder


def test_a_library_that_is_not_what_it_was(folder: CodeFolder) -> None:
    Path(folder.path, "layer-1.so").write_bytes(b"layer-2.so")
    with pytest.raises(SnapshotError, match="compiled code is damaged") as error:
        load_code(CodeFolder.read(folder.path))
    assert str(error.value.where).endswith("layer-1.so")
    assert cached(os.path.dirname(folder.path), "code") is None
    os.unlink(os.path.join(folder.path, "layer-1.so"))
    with pytest.raises(SnapshotError, match="cannot be read"):
        load_code(folder)


def test_a_library_of_another_folder(folder: CodeFolder) -> None:
    with pytest.raises(SnapshotError, match="damaged"):
        folder.bytes_of(replace(folder.sizes[0].layer, name="../code/layer-1.so"))


def test_what_no_linker_takes_cannot_be_loaded(folder: CodeFolder) -> None:
    with pytest.raises(SnapshotError, match="compiled code cannot be loaded"):
        load_code(folder)
    with pytest.raises(SnapshotError, match="compiled code cannot be loaded"):
        load_library(b"")


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"version": 2}', '{"version": 1, "sizes": [], "shape": {}, "note": ""}'],
)
def test_an_index_that_says_something_else(folder: CodeFolder, index: str) -> None:
    Path(folder.path, "step.json").write_text(index)
    with pytest.raises(SnapshotError, match="damaged"):
        CodeFolder.read(folder.path)
    assert cached(os.path.dirname(folder.path), "code") is None


def test_what_others_may_write_is_not_looked_at(folder: CodeFolder, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder.path)
    with pytest.raises(SnapshotError, match="somebody else may write"):
        CodeFolder.read(str(link))
    for path, mode in ((folder.path, 0o770), (os.path.join(folder.path, "step.json"), 0o606)):
        before = os.stat(path).st_mode
        os.chmod(path, mode)
        with pytest.raises(SnapshotError, match="somebody else may write"):
            CodeFolder.read(folder.path)
        os.chmod(path, before)
    assert CodeFolder.read(folder.path) == folder


def test_the_key_is_of_all_that_decides_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(SHAPE, (1, 2))
    assert key == key_of(SHAPE, [1, 2])
    others = [replace(SHAPE, threads=3), replace(SHAPE, vectors="F32")]
    assert len({key, key_of(SHAPE, (1,)), *(key_of(shape, (1, 2)) for shape in others)}) == 4
    for name, here in (("cpu_here", ("GenuineIntel", ())), ("torch_version", "1.0")):
        with monkeypatch.context() as patch:
            patch.setattr(f"coldframe.runtime.code_folder.{name}", lambda here=here: here)
            assert key_of(SHAPE, (1, 2)) != key


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == f"{tmp_path}/coldframe/compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == f"{tmp_path}/.cache/coldframe/compiled"


def test_only_what_is_faster_in_every_case_is_kept() -> None:
    assert worth_keeping([GAIN, 2.0])
    assert not worth_keeping([GAIN - 0.001, 2.0])
    assert not worth_keeping([])


def test_the_index_is_json_for_people(folder: CodeFolder) -> None:
    found = json.loads(Path(folder.path, "step.json").read_bytes())
    assert found["sizes"][0]["speedup"] == 1.5
    assert found["shape"]["threads"] == 2
