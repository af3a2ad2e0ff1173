from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from coldframe.benchmarks.harness import evict_files
from coldframe.loader.checkpoints.residency import cached_bytes
from coldframe.loader.errors import PlatformError, ReplicaError
from coldframe.snapshot import places
from coldframe.snapshot.cloner import Cloner
from coldframe.snapshot.places import (
    default_store,
    expanded,
    images_are_there,
    read_ahead,
    template_directory,
    templates,
)
from tests.runtime.snapshots import eventually
from tests.support import unavailable


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COLDFRAME_RUN_DIR", str(tmp_path))
    path = Path(template_directory())
    path.mkdir(mode=0o700)
    (path / "one").touch()
    return path


def test_templates_are_found_in_a_directory_of_our_own(directory: Path) -> None:
    assert templates() == [str(directory / "one")]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o750])
def test_not_where_others_could_put_them(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    assert templates() == []


def test_nor_where_the_directory_is_somebody_elses(directory: Path) -> None:
    if os.geteuid() != 0:
        unavailable("giving a directory away takes root")
    os.chown(directory, 65534, 65534)
    assert templates() == []


def test_nor_through_a_symbolic_link(directory: Path, tmp_path: Path) -> None:
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    assert templates() == []


def test_a_listener_whose_queue_is_full_is_not_waited_for(directory: Path) -> None:
    path = str(directory / "busy")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with ExitStack() as waiting:

            def fill() -> None:
                for _ in range(8):
                    waiting.callback(Cloner.connect(path).close)

            with pytest.raises(ReplicaError, match="no template listens there"):
                fill()


def test_a_home_is_what_no_shell_has_put_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expanded("~/images") == "/home/somebody/images"
    assert expanded("s3://bucket/~") == "s3://bucket/~"
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_store() == "/home/somebody/.cache/coldframe/snapshots"


def test_a_store_without_a_manifest_has_no_images(tmp_path: Path) -> None:
    assert not images_are_there(str(tmp_path))
    (tmp_path / "manifests").mkdir()
    assert not images_are_there(str(tmp_path))
    (tmp_path / "manifests" / "a.json").touch()
    assert images_are_there(str(tmp_path))
    assert images_are_there("s3://bucket/prefix")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of one image, of which nothing is in the page cache."""
    for folder, size in (("manifests", 5000), ("objects", 3 << 20)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.json").write_bytes(os.urandom(size))
    _evict(tmp_path)
    return tmp_path


def _evict(store: Path) -> None:
    try:
        evict_files(store.glob("*/*"))
    except PlatformError as error:
        unavailable(str(error))


def _cached(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        return cached_bytes(fd, 0, size) >= size
    finally:
        os.close(fd)


def test_a_small_image_is_on_its_way_before_it_is_asked_for(store: Path) -> None:
    os.mkfifo(store / "objects" / "nobody-writes")  # and does not hold anybody up
    (store / "objects" / "elsewhere").symlink_to("/dev/zero")
    read_ahead(str(store))
    eventually(lambda: _cached(store / "manifests" / "one.json"))
    eventually(lambda: _cached(store / "objects" / "one.json"))


def test_of_images_that_are_not_small_the_manifests_are(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_AHEAD_BYTES", 1 << 20)
    read_ahead(str(store))
    eventually(lambda: _cached(store / "manifests" / "one.json"))
    assert not _cached(store / "objects" / "one.json")


@pytest.mark.parametrize("store", ["s3://bucket/prefix", "/nowhere"])
def test_nothing_is_read_ahead_where_nothing_lies(store: str) -> None:
    read_ahead(store)
