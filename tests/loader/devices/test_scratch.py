"""A worker's own memory on a GPU, over the emulated driver."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from coldframe.loader.arena import SCRATCH_BASE
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.scratch import Scratch
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ArenaError, DeviceError, DeviceFull
from tests.loader.devices.emulator import GRANULARITY, Emulator

MIB = 1 << 20


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """A small GPU, all of which is given back."""
    emulator = Emulator(126 * MIB)
    yield emulator
    left = emulator.left()
    emulator.close()
    assert left == []


@pytest.fixture
def scratch(gpu: Context) -> Iterator[Scratch]:
    made = Scratch(gpu, 1 << 30)
    yield made
    made.close()


def test_it_lies_where_it_lies_in_every_process(scratch: Scratch, gpu: Context) -> None:
    assert (scratch.address, scratch.fixed) == (SCRATCH_BASE, True)
    assert scratch.dlpack_device == (2, 0)
    another = Scratch(gpu, 1 << 30)  # which finds the place taken
    assert not another.fixed
    assert another.address != SCRATCH_BASE
    another.close()


def test_pieces_lie_behind_one_another_and_have_memory(
    scratch: Scratch, emulator: Emulator, gpu: Context
) -> None:
    assert (scratch.grown, scratch.used) == (0, 0)
    first, second = scratch.take(1000), scratch.take(3 * MIB)
    assert (first, second) == (SCRATCH_BASE, SCRATCH_BASE + 1024)
    assert scratch.used == 1024 + 3 * MIB
    assert scratch.grown == 16 * MIB == emulator.used
    third = scratch.take(20 * MIB)
    assert third == SCRATCH_BASE + scratch.used - 20 * MIB
    assert scratch.grown == 32 * MIB
    # Memory of this GPU is the host's: it can be written to, to its end.
    driver, end = gpu.driver, third + 20 * MIB - 8
    stream = driver.stream()
    driver.fill_zeros(end, 8, stream)
    driver.synchronize(stream)
    driver.destroy_stream(stream)


def test_nobody_can_be_given_a_descriptor_of_it(gpu: Context) -> None:
    driver = gpu.driver
    memory = driver.create(0, GRANULARITY, shareable=False)
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE"):
        driver.export(memory)
    driver.release(memory)


def test_what_was_given_back_is_used_again(scratch: Scratch, emulator: Emulator) -> None:
    kept = scratch.take(4096)
    scratch.fix()
    pieces = [scratch.take(MIB) for _ in range(3)]
    for piece in pieces[:2]:
        scratch.give_back(piece)
    assert scratch.take(MIB) == pieces[2] + MIB  # as long as any of them is in use
    scratch.give_back(pieces[2] + MIB)
    scratch.give_back(pieces[2])
    assert scratch.used == 4096
    assert scratch.take(MIB) == pieces[0] == kept + 4096
    assert emulator.used == scratch.grown == 16 * MIB


def test_memory_can_be_had_before_anybody_takes_it(scratch: Scratch) -> None:
    scratch.reach(20 * MIB)
    assert (scratch.grown, scratch.used) == (32 * MIB, 0)
    scratch.reach(5)
    assert scratch.grown == 32 * MIB


def test_a_full_gpu_leaves_it_as_it_was(scratch: Scratch, emulator: Emulator) -> None:
    scratch.take(100 * MIB)
    before = (scratch.used, scratch.grown)
    with pytest.raises(DeviceFull, match="CUDA_ERROR_OUT_OF_MEMORY"):
        scratch.take(64 * MIB)
    assert (scratch.used, scratch.grown) == before
    # Where there is not what it would like to have, it takes what it must.
    scratch.take(scratch.grown - scratch.used)
    scratch.take(14 * MIB)
    assert scratch.grown == emulator.used == 126 * MIB


def test_addresses_end(gpu: Context) -> None:
    scratch = Scratch(gpu, 2 * MIB)
    with pytest.raises(ArenaError, match="at its end"):
        scratch.take(3 * MIB)
    assert scratch.take(2 * MIB) == SCRATCH_BASE
    with pytest.raises(ArenaError, match="at its end"):
        scratch.take(1)
    scratch.close()


def test_nothing_of_it_is_left(gpu: Context, emulator: Emulator) -> None:
    scratch = Scratch(gpu, 1 << 30)
    scratch.take(5 * MIB)
    before = set(os.listdir("/proc/self/fd"))
    scratch.close()
    assert emulator.used == 0
    assert set(os.listdir("/proc/self/fd")) <= before
    again = DeviceReservation(gpu, GRANULARITY, SCRATCH_BASE, exact=True)
    again.close()


def test_a_driver_that_refuses_costs_nothing(scratch: Scratch, emulator: Emulator) -> None:
    emulator.fail("cuMemMap", 1, "CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(DeviceError, match="CUDA_ERROR_INVALID_VALUE"):
        scratch.take(MIB)
    assert (emulator.used, scratch.used, scratch.grown) == (0, 0, 0)
    assert scratch.take(MIB) == SCRATCH_BASE
