"""Whole benchmarks have the machine to themselves: what they compare is time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("heavy") is not None:
            item.add_marker(pytest.mark.alone)


@pytest.fixture
def own_model(demo_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A demo model that no other test has mapped, so that its files can be evicted."""

    def make(family: str = "llama", dtype: str = "float32") -> Path:
        return Path(shutil.copytree(demo_model(family, dtype), tmp_path / f"{family}-{dtype}"))

    return make
