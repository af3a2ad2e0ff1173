"""What tests of every package use."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest


def unavailable(reason: str) -> NoReturn:
    """This machine lacks what the test needs: a skip, but in CI, where nothing may be skipped."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def without_settings() -> dict[str, str]:
    """This process's environment without what coldframe is told by it, but for what tests say."""
    return {
        name: value
        for name, value in os.environ.items()
        if "COLDFRAME" not in name or name in ("COLDFRAME_DEVICE", "COLDFRAME_AT_ZERO")
    }


def importable(folder: Path) -> str:
    """A PYTHONPATH by which an interpreter that knows of no packages finds this checkout.

    Args:
        folder: Where to make it.
    """
    (folder / "coldframe").symlink_to(Path(__file__).parents[1])
    return str(folder)


@contextmanager
def no_threads_left() -> Iterator[None]:
    """Whatever threads are started within have ended behind it, or are about to."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        while thread.ident is None:  # another one is just starting it
            time.sleep(0.001)
        thread.join(10)
        assert not thread.is_alive(), thread.name
