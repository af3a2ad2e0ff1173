"""Memory services that give each other KV, and each way that it may go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coldframe.loader.process import remove_run_dir
from coldframe.loader.transport.nixl import nixl_package
from tests.loader.transport.side import SECRET, Side
from tests.loader.weights import layered
from tests.support import unavailable

WAYS = ("shared", "tcp", "nixl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layered(tmp_path_factory.mktemp("m") / "m")


@pytest.fixture
def open_service(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Side]]:
    monkeypatch.setenv("COLDFRAME_KV_SECRET", SECRET)
    made: list[Side] = []

    def begin(**options: Any) -> Side:
        made.append(Side(tmp_path_factory.mktemp("r")))
        made[-1].begin(model, **options)
        return made[-1]

    try:
        yield begin
        for side in made:
            side.close()
            assert side.child.wait() in (0, -9)
    finally:
        for side in made:
            side.child.kill()
            side.close()
            remove_run_dir(side.run_dir)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Each way that KV may go."""
    if request.param == "nixl" and nixl_package() is None:
        unavailable("there is no NIXL: pip install 'coldframe[nixl]'")
    return str(request.param)
