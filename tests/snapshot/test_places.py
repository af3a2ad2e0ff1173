from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from coldframe.loader.errors import ReplicaError
from coldframe.snapshot.cloner import Cloner
from coldframe.snapshot.places import (
    default_store,
    expanded,
    images_are_there,
    template_directory,
    templates,
)
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
