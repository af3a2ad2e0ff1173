"""What tests of every package use."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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


_MAP_LOCKED = 0x2000


@contextmanager
def held_in_memory(folder: Path) -> Iterator[None]:
    """A folder's files stay in the page cache meanwhile.

    To have been read or written just now is no promise of that: a kernel that reclaims memory
    before it is wanted (DAMON) goes by what it thinks is cold. Where no memory may be locked, it is
    all there is.
    """
    with ExitStack() as stack:
        for path in folder.iterdir():
            if path.is_file() and path.stat().st_size:
                path.read_bytes()
                with path.open("rb") as file, suppress(OSError):
                    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE | _MAP_LOCKED
                    held = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ)
                    stack.enter_context(held)
        yield


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
