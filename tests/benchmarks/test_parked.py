"""The measurement of parked weights, on an emulated driver: its figures mean nothing."""

from __future__ import annotations

import pytest

from coldframe.benchmarks.parked import measure
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import DeviceError
from tests.loader.devices.emulator import Emulator

SIZE = (9 << 20) + 5


def test_it_measures_and_leaves_nothing() -> None:
    emulator = Emulator()
    gpu = Context(Driver.open(emulator), 0)
    found = measure(gpu, SIZE, stages=5, runs=3, piece=2 << 20, streams=2)
    assert found.nbytes == SIZE
    assert len(found.rates) == len(found.bare_rates) == len(found.come_back_s) == 3
    assert min(found.keep_rate, *found.rates, *found.bare_rates) > 0
    assert all(
        0 < first <= whole for first, whole in zip(found.first_s, found.bring_s, strict=True)
    )
    assert found.note == "in locked memory"
    emulator.fail("cuMemcpyHtoDAsync", 3)
    with pytest.raises(DeviceError, match="cuMemcpyHtoDAsync"):
        measure(gpu, SIZE, piece=2 << 20)
    gpu.close()
    assert emulator.left() == []
    emulator.close()
