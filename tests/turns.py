"""Where several processes run tests at once: which of them may run beside one another."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["Turns"]


class Turns:
    """A plugin of pytest: a test that is marked `alone` runs while no other process runs one.

    All others run beside one another. Who is to be alone waits in the door until those inside are
    done, so that nobody comes in meanwhile. The locks are a process's own: they end with it, and
    what it forks has none of them.

    Args:
        folder: The same one for all processes.
    """

    def __init__(self, folder: Path) -> None:
        self._door, self._room = (
            os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            for name in ("door", "room")
        )

    # Outermost: the time that pytest-timeout gives a test begins when its turn has come.
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        with self.turn(alone=item.get_closest_marker("alone") is not None):
            return (yield)

    @contextmanager
    def turn(self, *, alone: bool) -> Iterator[None]:
        """Waits for it."""
        fcntl.lockf(self._door, fcntl.LOCK_EX)
        try:
            fcntl.lockf(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.lockf(self._door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.lockf(self._room, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._door)
        os.close(self._room)
