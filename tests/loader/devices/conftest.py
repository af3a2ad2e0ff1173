"""An emulated GPU, and a check that nothing of it is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from tests.loader.devices.emulator import Emulator


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """A driver with one GPU of 1 GiB. Unless the GPU is lost, all of it is given back."""
    emulator = Emulator()
    yield emulator
    left = emulator.left()
    emulator.close()
    assert emulator.is_lost or left == []
    ours = ("ring-", "cuda-", "emulated-")
    assert [t.name for t in threading.enumerate() if t.name.startswith(ours)] == []


@pytest.fixture
def gpu(emulator: Emulator) -> Iterator[Context]:
    """The GPU's context; not current in any thread yet."""
    context = Context(Driver.open(emulator), 0)
    yield context
    if not emulator.is_lost:
        context.close()
