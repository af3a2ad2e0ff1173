"""Loads that find their weights in the cache, also where they have gone bad there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.devices import open_device
from coldframe.loader.errors import ColdframeError, SourceCorrupt, SourceUnreachable
from coldframe.loader.loads.base import LoadEvents
from coldframe.loader.loads.load import Load
from coldframe.loader.loads.options import LoadOptions
from coldframe.loader.sources.base import SEALED
from coldframe.loader.timeline import Recorder
from tests.loader.loads.test_load import Watched
from tests.loader.web.servers import nginx
from tests.loader.weights import evict, layered, reference, shard_files


@pytest.fixture(autouse=True)
def lease_signal() -> Iterator[None]:
    before = signal.signal(signal.SIGIO, lambda *_: None)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "www").mkdir()
    root = layered(tmp_path / "www" / "m", nbytes=200_000)
    (root / "tokenizer.json").write_text('{"a": 1}')
    return root


class Kept(Watched):
    """A load over a network with a cache, run to its end; `kept` is the reason why nothing is."""

    def __init__(self, uri: str, tmp_path: Path, **options: Any) -> None:
        self.said = []
        self.ends: list[ColdframeError | None] = []
        self.kept: list[str | None] = []
        self.done = threading.Event()
        self.files = tmp_path / f"files-{os.urandom(4).hex()}"
        self.load = Load(
            LoadOptions(uri, cache=str(tmp_path / "cache"), cache_bytes=1 << 30, **options),
            open_device("cpu"),
            Recorder("memory"),
            LoadEvents(
                on_files=self.said.append,
                on_plan=lambda: None,
                on_stage=lambda stage: None,
                on_end=self.ends.append,
                on_kept=self._on_kept,
            ),
            files_dir=str(self.files),
        )
        self.load.run()
        self.wait()

    def _on_kept(self, why: str | None) -> None:
        self.kept.append(why)
        self.done.set()


@pytest.fixture
def base(model: Path) -> Iterator[str]:
    with nginx(model.parent) as url:
        yield url


@pytest.fixture
def entry(base: str, model: Path, tmp_path: Path) -> Path:
    """The model in the cache."""
    first = Kept(f"{base}/m", tmp_path)
    assert first.done.wait(20)
    assert first.kept == [None]
    first.close()
    (found,) = (tmp_path / "cache").iterdir()
    return found


def flip(entry: Path, *, cached: bool) -> None:
    path = shard_files(entry)[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for each in shard_files(entry):
        evict(each)
        if cached:
            each.read_bytes()


def test_what_is_in_the_cache_is_read_there(entry: Path, base: str, tmp_path: Path) -> None:
    again = Kept(f"{base}/m", tmp_path)
    assert again.done.wait(20)
    assert again.load.weights.why is not None
    assert again.load.weights.why.startswith("from the cache")
    assert again.kept == again.ends == [None]
    assert again.tensors() == reference(entry)
    # Another process may take the entry away at any time: what workers need is not in it.
    assert again.said == [str(again.files)]
    assert (again.files / "tokenizer.json").read_text() == '{"a": 1}'
    again.close()


def test_an_entry_that_has_gone_bad_is_taken_away_and_the_weights_come_from_afar(
    entry: Path, base: str, model: Path, tmp_path: Path
) -> None:
    flip(entry, cached=False)
    again = Kept(f"{base}/m", tmp_path, copy=True)
    assert again.done.wait(20)
    assert again.ends == [None]
    assert again.tensors() == reference(model)
    assert again.load.weights.verified == SEALED
    assert not entry.exists()
    assert again.kept == ["what was there was bad, and is taken away"]
    assert (again.files / "tokenizer.json").exists()
    again.close()


def test_a_mapped_entry_that_has_gone_bad_is_found_and_taken_away(
    entry: Path, base: str, tmp_path: Path
) -> None:
    flip(entry, cached=True)
    again = Kept(f"{base}/m", tmp_path)
    assert again.load.weights.mode == "mapped"
    assert again.load.weights.must_verify
    with pytest.raises(SourceCorrupt, match="in the cache, and is taken away"):
        again.load.weights.verify()
    assert not entry.exists()
    again.close()


def test_a_bad_entry_that_nothing_stands_behind_is_taken_away(
    entry: Path, model: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(entry, cached=False)
    uri = f"{base}/m"

    def unreachable(places: Iterator[object], failures: object) -> None:
        assert len(list(places)) == 1
        raise SourceUnreachable("no such host", where=uri)

    monkeypatch.setattr("coldframe.loader.loads.resolving.first_that_opens", unreachable)
    again = Kept(uri, tmp_path, copy=True)
    (error,) = again.ends
    assert isinstance(error, SourceCorrupt)
    assert "taken away" in error.hint
    assert not entry.exists()
    again.close()


def test_a_network_is_given_up_soon_only_where_the_cache_has_something(
    entry: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried: list[bool] = []

    def origins(places: object, throttle: object, *, hurry_last: bool) -> Iterator[object]:
        hurried.append(hurry_last)
        raise SourceUnreachable("far enough")

    monkeypatch.setattr("coldframe.loader.loads.resolving.origins_of", origins)
    for uri in (f"{base}/m", f"{base}/other"):
        with pytest.raises(SourceUnreachable, match="far enough"):
            Kept(uri, tmp_path)
    assert hurried == [True, False]
