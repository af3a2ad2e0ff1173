from __future__ import annotations

import threading
from pathlib import Path

import pytest

from coldframe.loader.checkpoints.companions import Companions
from coldframe.loader.errors import (
    ColdframeError,
    SourceCredentials,
    SourceDenied,
    SourceNotFound,
)
from coldframe.loader.sources.directory import DirectoryOrigin
from coldframe.loader.timeline import Recorder


class Refusing(DirectoryOrigin):
    """A folder that refuses one of its files."""

    def __init__(self, path: Path, name: str, error: ColdframeError) -> None:
        super().__init__(str(path))
        self.name = name
        self.error = error

    def read_small(self, name: str, limit: int) -> bytes:
        if name == self.name:
            raise self.error
        return super().read_small(name, limit)


CONFIG = b'{"as": "it was read"}'


def bring(origin: DirectoryOrigin, target: Path, *, stay: bool = False) -> list[object]:
    said: list[object] = []
    ended = threading.Event()

    def say(what: object) -> None:
        said.append(what)
        ended.set()

    companions = Companions(str(target), Recorder("memory"), say, say)
    companions.bring(origin, CONFIG, stay=stay)
    assert ended.wait(10)
    return said


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "m"
    root.mkdir()
    for name in ("config.json", "tokenizer.json", "secret.json"):
        (root / name).write_text(name)
    return root


def test_those_of_a_directory_that_stays_are_left_there(model: Path, tmp_path: Path) -> None:
    assert bring(DirectoryOrigin(str(model)), tmp_path / "files", stay=True) == [str(model)]
    assert not (tmp_path / "files").exists()


def test_any_others_are_fetched(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "files"
    assert bring(DirectoryOrigin(str(model)), target) == [str(target)]
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.json"]
    # The one that the checkpoint was opened with, not one that may have come since.
    assert (target / "config.json").read_bytes() == CONFIG


def test_they_are_all_that_a_chat_needs(model: Path, tmp_path: Path) -> None:
    wanted = {
        "chat_template.jinja",
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in wanted:
        (model / name).write_text(name)
    target = tmp_path / "files"
    assert bring(DirectoryOrigin(str(model)), target) == [str(target)]
    assert {path.name for path in target.iterdir()} == wanted
    for name in wanted - {"config.json"}:
        assert (target / name).read_text() == name


@pytest.mark.parametrize("kind", [SourceDenied, SourceNotFound])
def test_one_that_is_not_there_or_denied_is_left_out(
    kind: type[ColdframeError], model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "files"
    origin = Refusing(model, "tokenizer.json", kind("no"))
    assert bring(origin, target) == [str(target)]
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_credentials_that_expired_are_not_a_missing_file(model: Path, tmp_path: Path) -> None:
    error = SourceCredentials("expired")
    assert bring(Refusing(model, "tokenizer.json", error), tmp_path / "files") == [error]
