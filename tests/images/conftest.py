"""The image, built once; containers of it; and a model that a container's user may read."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.images.building import Builder, check_tools
from tests.images.container import Container, Platform, container

Run = Callable[[Platform], AbstractContextManager[Container]]


class Image(NamedTuple):
    """An image that has been built.

    Args:
        name: In the builder's storage.
        config: Its own, as OCI has it.
        root: Its root file system.
    """

    name: str
    config: dict[str, Any]
    root: Path

    def run(self, platform: Platform) -> AbstractContextManager[Container]:
        return container(self.root, self.config, platform)


@pytest.fixture(scope="session")
def builder() -> Builder:
    check_tools()
    return Builder()


@pytest.fixture(scope="session")
def mounted(builder: Builder) -> Iterator[Callable[[str], Image]]:
    """Images by their names, mounted until the last test is over."""
    with ExitStack() as stack:
        yield lambda name: Image(
            name, builder.config(name), stack.enter_context(builder.mounted(name))
        )


@pytest.fixture(scope="session")
def image(builder: Builder, mounted: Callable[[str], Image]) -> Image:
    """The one of images/cpu.Dockerfile."""
    return mounted(builder.cpu())


@pytest.fixture(scope="session")
def model(demo_model: Callable[..., Path]) -> Iterator[Path]:
    """A tiny model in a folder that everybody may read."""
    with readable(demo_model("llama", "float32")) as place:
        yield place


@contextmanager
def readable(model: Path) -> Iterator[Path]:
    """A copy of a model in a folder that everybody may read; pytest's own are closed to others."""
    base = Path(tempfile.mkdtemp(prefix="cf-"))
    place = base / "demo"
    shutil.copytree(model, place)
    for path in (base, place, *place.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    yield place
    shutil.rmtree(base)


@pytest.fixture(scope="session")
def expected(model: Path) -> str:
    """What Transformers answers to the tests' prompt."""
    from tests.images.platforms import COUNT, PROMPT
    from tests.runtime.serving import greedy, ids_of

    return greedy(model, ids_of(model, PROMPT), COUNT)
