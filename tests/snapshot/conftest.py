"""An image that many tests clone."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from coldframe.snapshot.criu import Criu
from coldframe.snapshot.manifest import Manifest
from tests.snapshot.tiny import Image, frozen


class Stored(NamedTuple):
    """An image in a store."""

    store: Path
    manifest: Manifest


@pytest.fixture(scope="session")
def image(criu: Criu, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """A tiny worker, frozen with `state` set to 41."""
    return frozen(criu, tmp_path_factory.mktemp("image") / "tiny", "state = 41")


@pytest.fixture(scope="session")
def stored(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """That image in a store."""
    store = tmp_path_factory.mktemp("store")
    return Stored(store, image.stored(store))
