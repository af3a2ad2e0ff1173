from __future__ import annotations

import sys
from pathlib import Path

import pytest

from coldframe.loader.errors import PlatformError, SnapshotError
from coldframe.snapshot.engine_key import EngineKey


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for packages, with one in it: its list of files."""
    folder = tmp_path / "engine_x-1.2.3.dist-info"
    folder.mkdir()
    record = folder / "RECORD"
    record.write_text("engine_x/__init__.py,sha256=abc,10")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nowhere"), str(tmp_path)])
    return record


def test_it_tells_what_is_installed(installed: Path) -> None:
    key = EngineKey.of("x", ["engine_x"], {"b": 1, "a": [2]})
    assert key.build.startswith("engine_x 1.2.3 ")
    assert key.arguments == '{"a": [2], "b": 1}'
    assert EngineKey.from_json(key.to_json()) == key
    assert key.refusal(EngineKey.of("x", ["engine_x"], {"a": [2], "b": 1})) is None
    installed.write_text("engine_x/__init__.py,sha256=abd,10")
    refusal = key.refusal(EngineKey.of("x", ["engine_x"], {"a": [2], "b": 1}))
    assert refusal is not None
    assert refusal.field == "engine.build"


def test_a_package_that_is_not_there_is_named(installed: Path) -> None:
    with pytest.raises(PlatformError, match="engine_y"):
        EngineKey.of("x", ["engine_x", "engine_y"], {})


def test_sizes_are_an_images_own_unless_others_are_asked_for(installed: Path) -> None:
    key = EngineKey.of("x", ["engine_x"], {}, {"context": 64, "kv": -1})
    assert EngineKey.from_json(key.to_json()) == key
    assert key.refusal(EngineKey.of("x", ["engine_x"], {})) is None
    assert key.refusal(EngineKey.of("x", ["engine_x"], {}, {"context": 64})) is None
    refusal = key.refusal(EngineKey.of("x", ["engine_x"], {}, {"context": 65, "kv": -1}))
    assert refusal == ("engine.context", "64", "65")
    refusal = key.refusal(EngineKey.of("x", ["engine_x"], {}, {"other": 1}))
    assert refusal == ("engine.other", "None", "1")


@pytest.mark.parametrize("sizes", ["", "[1]", '{"a": "b"}', '{"a": 1}x', '{"A": 1}'])
def test_sizes_that_are_none_are_refused(sizes: str) -> None:
    with pytest.raises(SnapshotError, match="sizes"):
        EngineKey.from_json({"name": "x", "build": "", "arguments": "{}", "sizes": sizes})
