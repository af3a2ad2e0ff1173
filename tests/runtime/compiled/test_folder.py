"""Compiled code as files: what is damaged, foreign or for something else is not taken."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.errors import PlatformError, SnapshotError
from coldframe.runtime.compiled import compiler
from coldframe.runtime.compiled.cxx import compiler_version, has_compiler
from coldframe.runtime.compiled.folder import (
    CodeFile,
    CodeFolder,
    SizedFiles,
    cache_root,
    cached,
    key_of,
    open_root,
    write_private,
)
from coldframe.runtime.compiled.loading import load_code, load_library
from coldframe.runtime.engine.code_shape import CodeShape
from tests.runtime.snapshots import program

SHAPE = CodeShape("BF16", "BF16", 8, 16, 2, 1, 4, 32, 1e-5, False, False, False, False, 2)


@pytest.fixture
def folder(tmp_path: Path) -> CodeFolder:
    """A folder as the compiler leaves it, but for what is in its libraries."""
    return written_in(tmp_path / "code")


def written_in(path: Path) -> CodeFolder:
    path.mkdir(0o700)
    for name in ("layer-1.so", "logits-1.so"):
        write_private(str(path / name), name.encode())
    files = (CodeFile.of(str(path), name) for name in ("layer-1.so", "logits-1.so"))
    written = CodeFolder(str(path), SHAPE, (SizedFiles(1, *files, 1.5, 1024),), "1: 1.50 x eager")
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
    ["", "[]", "{}", '{"version": 3}', '{"version": 2, "sizes": [], "shape": {}, "note": ""}'],
)
def test_an_index_that_says_something_else(folder: CodeFolder, index: str) -> None:
    Path(folder.path, "step.json").write_text(index)
    with pytest.raises(SnapshotError, match="damaged"):
        CodeFolder.read(folder.path)
    assert cached(os.path.dirname(folder.path), "code") is None


def test_what_others_may_write_is_not_looked_at(folder: CodeFolder, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder.path)
    with pytest.raises(SnapshotError, match="cannot be read"):
        CodeFolder.read(str(link))
    index, library = (os.path.join(folder.path, name) for name in ("step.json", "layer-1.so"))
    for path, mode in ((str(tmp_path), 0o770), (folder.path, 0o770), (index, 0o606)):
        before = os.stat(path).st_mode
        os.chmod(path, mode)
        with pytest.raises(SnapshotError, match="somebody else may write"):
            CodeFolder.read(folder.path)
        os.chmod(path, before)
    assert CodeFolder.read(folder.path) == folder
    os.chmod(library, 0o620)
    with pytest.raises(SnapshotError, match="somebody else may write"):
        load_code(folder)
    assert cached(str(tmp_path), "code") is None


@pytest.mark.parametrize("name", ["step.json", "layer-1.so"])
def test_no_link_is_followed(folder: CodeFolder, tmp_path: Path, name: str) -> None:
    place = Path(folder.path, name)
    place.rename(tmp_path / name)
    place.symlink_to(tmp_path / name)
    with pytest.raises(SnapshotError, match="cannot be read"):
        load_code(CodeFolder.read(folder.path))


@pytest.mark.parametrize("umask", [0o002, 0])
def test_the_umask_does_not_matter(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        written = written_in(tmp_path / "code")
        with compiler._locked(str(tmp_path), 0):
            pass
    finally:
        os.umask(before)
    assert cached(str(tmp_path), "code") == written
    made = [tmp_path / "lock", *Path(written.path).iterdir()]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}


def test_a_step_that_was_no_faster_does_not_count_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "code"
    path.mkdir(0o700)
    slow = CodeFolder(str(path), SHAPE, (), "no faster than eager")
    slow.write()
    os.utime(path / "step.json", (1000, 1000))
    assert cached(str(tmp_path), "code", since=1000) == slow
    assert cached(str(tmp_path), "code", since=1001) is None


def test_what_is_faster_stays_so(folder: CodeFolder, tmp_path: Path) -> None:
    assert cached(str(tmp_path), "code", since=time.time() + 1000) == folder


def test_a_lock_is_waited_for_no_longer_than_so(tmp_path: Path) -> None:
    with (
        compiler._locked(str(tmp_path), 0),
        pytest.raises(PlatformError, match="another is being compiled"),
        compiler._locked(str(tmp_path), 0),
    ):
        pass
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), compiler._locked(str(tmp_path), 0):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_what_nobody_has_used_for_long_goes(tmp_path: Path) -> None:
    used, unused, fresh = ("a" * 32, "b" * 32, "c" * 32)
    others = ["theirs", ".writing-own", ".writing-new", ".writing-old"]
    for name in (used, unused, fresh, *others):
        written_in(tmp_path / name)
        long_ago = time.time() - 31 * 24 * 3600
        if name not in (fresh, ".writing-new"):
            os.utime(tmp_path / name, (long_ago, long_ago))
    assert cached(str(tmp_path), used) is not None
    compiler._sweep(str(tmp_path), str(tmp_path / ".writing-own"))
    left = [used, fresh, "theirs", ".writing-own", ".writing-new"]
    assert sorted(os.listdir(tmp_path)) == sorted(left)


def test_a_sweep_goes_on_where_somebody_else_sweeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / ("b" * 32)
    written_in(old)
    os.utime(old, (1000, 1000))
    listed = list(os.scandir(tmp_path))
    (tmp_path / "gone").mkdir()
    gone = [entry for entry in os.scandir(tmp_path) if entry.name == "gone"]
    (tmp_path / "gone").rmdir()
    real, root = os.scandir, str(tmp_path)

    def scandir(path: Any) -> Any:
        return iter([*gone, *listed]) if path == root else real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    compiler._sweep(str(tmp_path), "")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("root", ["~/.cache", "", "relative"])
def test_a_cache_without_a_place_is_none(root: str) -> None:
    with pytest.raises(SnapshotError, match="no place"):
        open_root(root)
    assert cached(root, "code") is None


def test_the_key_is_of_all_that_decides_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(SHAPE, (1, 2))
    assert key == key_of(SHAPE, [1, 2])
    others = [replace(SHAPE, threads=3), replace(SHAPE, vectors="F32")]
    assert len({key, key_of(SHAPE, (1,)), *(key_of(shape, (1, 2)) for shape in others)}) == 4
    for name, here in (("cpu_here", ("GenuineIntel", ())), ("torch_version", "1.0")):
        with monkeypatch.context() as patch:
            patch.setattr(f"coldframe.runtime.compiled.folder.{name}", lambda here=here: here)
            assert key_of(SHAPE, (1, 2)) != key


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == f"{tmp_path}/coldframe/compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == f"{tmp_path}/.cache/coldframe/compiled"


def test_the_key_is_of_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = set()
    for version in ("one 1.0", "one 1.1"):
        program(tmp_path / "c++", f"echo '{version}'\necho more")
        monkeypatch.setenv("CXX", f"env {tmp_path}/c++")
        assert compiler_version() == version
        keys.add(key_of(SHAPE, (1,)))
    monkeypatch.setenv("CXX", f"{tmp_path}/none -O2")
    assert not has_compiler()
    assert compiler_version() is None
    keys.add(key_of(SHAPE, (1,)))
    monkeypatch.setenv("CXX", "'g++")
    assert not has_compiler()
    assert len(keys) == 3


def test_the_index_is_json_for_people(folder: CodeFolder) -> None:
    found = json.loads(Path(folder.path, "step.json").read_bytes())
    assert found["sizes"][0]["speedup"] == 1.5
    assert found["shape"]["threads"] == 2
