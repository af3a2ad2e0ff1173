"""The emulator is the driver's likeness: same names and arguments, and its rules."""

from __future__ import annotations

import ctypes
import inspect
import mmap
import os
import threading
from collections.abc import Callable

import pytest
from cuda.bindings import driver as real

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver, Memory
from coldframe.loader.errors import DeviceError, DeviceLost
from tests.loader.devices.emulator import GRANULARITY, Emulator

CALLS = sorted(name for name in dir(Emulator) if name.startswith("cu"))
BASE = 0x5000_0000_0000
UNIT = GRANULARITY


@pytest.mark.parametrize("name", CALLS)
def test_calls_have_the_bindings_signatures(name: str) -> None:
    ours = list(inspect.signature(getattr(Emulator(), name)).parameters)
    assert ours == list(inspect.signature(getattr(real, name)).parameters)


@pytest.mark.parametrize("name", CALLS)
def test_calls_take_what_the_bindings_take(name: str) -> None:
    """Both count the arguments alike."""
    count = len(inspect.signature(getattr(real, name)).parameters)
    with pytest.raises(TypeError):
        getattr(real, name)(*range(count + 1))
    with pytest.raises(TypeError):
        getattr(Emulator(), name)(*range(count + 1))


def test_types_are_the_bindings_own() -> None:
    assert Emulator().CUresult is real.CUresult
    with pytest.raises(AttributeError):
        Emulator().cuMemAlloc  # noqa: B018 - not emulated, so not to be called


def test_mapped_memory_can_be_touched_only_as_far_as_it_is_let(gpu: Context) -> None:
    driver = gpu.driver
    gpu.bind()
    memory = driver.create(0, GRANULARITY)
    address = driver.reserve(2 * GRANULARITY, GRANULARITY, BASE)
    assert address == BASE
    stream = driver.stream()
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        driver.fill_zeros(address, 8, stream)
    driver.map(address, GRANULARITY, memory)
    driver.set_access(address, GRANULARITY, 0, writable=True)
    driver.fill_zeros(address, GRANULARITY, stream)
    with pytest.raises(DeviceError, match="INVALID_VALUE"):  # beyond the mapping
        driver.fill_zeros(address + GRANULARITY - 4, 8, stream)
    driver.synchronize(stream)
    driver.unmap(address, GRANULARITY)
    driver.release(memory)
    driver.free_addresses(address, 2 * GRANULARITY)
    driver.destroy_stream(stream)


def test_who_writes_where_it_may_only_read_loses_the_device(
    emulator: Emulator, gpu: Context
) -> None:
    driver = gpu.driver
    gpu.bind()
    memory, address = driver.create(0, GRANULARITY), driver.reserve(GRANULARITY, GRANULARITY, 0)
    driver.map(address, GRANULARITY, memory)
    driver.set_access(address, GRANULARITY, 0, writable=False)
    stream = driver.stream()
    driver.fill_zeros(address, 8, stream)
    with pytest.raises(DeviceLost, match="ILLEGAL_ADDRESS"):
        driver.synchronize(stream)
    with pytest.raises(DeviceLost):  # and stays so
        driver.create(0, GRANULARITY)


def test_released_memory_lives_while_it_is_mapped(emulator: Emulator, gpu: Context) -> None:
    driver = gpu.driver
    gpu.bind()
    memory, address = driver.create(0, GRANULARITY), driver.reserve(GRANULARITY, GRANULARITY, 0)
    driver.map(address, GRANULARITY, memory)
    driver.set_access(address, GRANULARITY, 0, writable=True)
    driver.release(memory)
    assert emulator.used == GRANULARITY
    ctypes.memmove(address, b"alive", 5)
    assert ctypes.string_at(address, 5) == b"alive"
    driver.unmap(address, GRANULARITY)
    assert emulator.used == 0
    driver.free_addresses(address, GRANULARITY)


def test_a_descriptor_keeps_memory_too(emulator: Emulator, gpu: Context) -> None:
    driver = gpu.driver
    memory = driver.create(0, GRANULARITY)
    fd = driver.export(memory)
    driver.release(memory)
    assert emulator.used == GRANULARITY
    again = driver.import_fd(fd)
    os.close(fd)
    assert emulator.used == GRANULARITY
    driver.release(again)
    assert emulator.used == 0


WRONG: dict[str, Callable[[Driver, int, Memory, Memory], object]] = {
    "size": lambda driver, at, mapped, gone: driver.create(0, GRANULARITY + 4096),
    "offset": lambda driver, at, mapped, gone: driver.map(at + 2 * UNIT + 4096, UNIT, mapped),
    "mapped twice": lambda driver, at, mapped, gone: driver.map(at + UNIT, UNIT, mapped),
    "too long": lambda driver, at, mapped, gone: driver.map(at + 2 * UNIT, 3 * UNIT, mapped),
    "not reserved": lambda driver, at, mapped, gone: driver.map(at + 6 * UNIT, UNIT, mapped),
    "mapped once released": lambda driver, at, mapped, gone: driver.map(at + 2 * UNIT, UNIT, gone),
    "released twice": lambda driver, at, mapped, gone: driver.release(gone),
    "exported once released": lambda driver, at, mapped, gone: driver.export(gone),
    "unmapped by half": lambda driver, at, mapped, gone: driver.unmap(at, UNIT),
    "not mapped": lambda driver, at, mapped, gone: driver.unmap(at + 2 * UNIT, 2 * UNIT),
    "freed while mapped": lambda driver, at, mapped, gone: driver.free_addresses(at, 6 * UNIT),
    "freed in part": lambda driver, at, mapped, gone: driver.free_addresses(at + 3 * UNIT, UNIT),
    "access to nothing": lambda driver, at, mapped, gone: driver.set_access(
        at + 2 * UNIT, UNIT, 0, writable=True
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_documentation_forbids_is_an_error(gpu: Context, wrong: str) -> None:
    driver = gpu.driver
    mapped, gone = driver.create(0, 2 * UNIT), driver.create(0, UNIT)
    driver.release(gone)
    address = driver.reserve(6 * UNIT, UNIT, 0)
    driver.map(address, 2 * UNIT, mapped)
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        WRONG[wrong](driver, address, mapped, gone)
    driver.unmap(address, 2 * UNIT)
    driver.release(mapped)
    driver.free_addresses(address, 6 * UNIT)


def test_copies_land_late_and_take_what_is_there_then(emulator: Emulator, gpu: Context) -> None:
    driver = gpu.driver
    gpu.bind()
    memory, address = driver.create(0, GRANULARITY), driver.reserve(GRANULARITY, GRANULARITY, 0)
    driver.map(address, GRANULARITY, memory)
    driver.set_access(address, GRANULARITY, 0, writable=True)
    host = mmap.mmap(-1, 8192)
    start = ctypes.addressof(ctypes.c_char.from_buffer(host))
    stream, event = driver.stream(), driver.event()
    driver.register_host(start, 4096)
    host[:5] = b"early"
    host[4096:4101] = b"early"
    emulator.hold()
    driver.copy_in(address, start, 5, stream)  # locked: the device reads it when it comes to it
    driver.copy_in(address + 16, start + 4096, 5, stream)  # not locked: taken at once
    driver.record(event, stream)
    host[:5] = b"later"
    host[4096:4101] = b"later"
    assert ctypes.string_at(address, 5) not in (b"early", b"later")
    emulator.go.set()
    driver.wait(event)
    assert ctypes.string_at(address, 5) == b"later"
    assert ctypes.string_at(address + 16, 5) == b"early"
    driver.unregister_host(start)
    driver.destroy_event(event)
    driver.destroy_stream(stream)
    driver.unmap(address, GRANULARITY)
    driver.release(memory)
    driver.free_addresses(address, GRANULARITY)


def test_unmapping_under_a_copy_loses_the_device(emulator: Emulator, gpu: Context) -> None:
    driver = gpu.driver
    gpu.bind()
    memory, address = driver.create(0, GRANULARITY), driver.reserve(GRANULARITY, GRANULARITY, 0)
    driver.map(address, GRANULARITY, memory)
    driver.set_access(address, GRANULARITY, 0, writable=True)
    stream = driver.stream()
    emulator.hold()
    driver.fill_zeros(address, 64, stream)
    driver.unmap(address, GRANULARITY)
    emulator.go.set()
    with pytest.raises(DeviceLost, match="ILLEGAL_ADDRESS"):
        driver.synchronize(stream)


def test_a_copy_reaches_over_no_edge_of_locked_memory(emulator: Emulator, gpu: Context) -> None:
    driver = gpu.driver
    gpu.bind()
    memory, address = driver.create(0, GRANULARITY), driver.reserve(GRANULARITY, GRANULARITY, 0)
    driver.map(address, GRANULARITY, memory)
    driver.set_access(address, GRANULARITY, 0, writable=True)
    host = mmap.mmap(-1, 3 * 4096)
    start = ctypes.addressof(ctypes.c_char.from_buffer(host))
    stream = driver.stream()
    for page in range(2):  # two stretches that touch, and a page that is not locked
        driver.register_host(start + 4096 * page, 4096, portable=bool(page))
    for offset in (4000, 8000):
        with pytest.raises(DeviceError, match="INVALID_VALUE"):
            driver.copy_in(address, start + offset, 200, stream)
        with pytest.raises(DeviceError, match="INVALID_VALUE"):
            driver.copy_out(start + offset, address, 200, stream)
    for page in range(3):
        driver.copy_in(address, start + 4096 * page, 4096, stream)
    driver.synchronize(stream)
    for page in range(2):
        driver.unregister_host(start + 4096 * page)
    driver.destroy_stream(stream)
    driver.unmap(address, GRANULARITY)
    driver.release(memory)
    driver.free_addresses(address, GRANULARITY)


def test_unlocking_under_a_copy_out_loses_the_device(emulator: Emulator, gpu: Context) -> None:
    driver = gpu.driver
    gpu.bind()
    memory, address = driver.create(0, GRANULARITY), driver.reserve(GRANULARITY, GRANULARITY, 0)
    driver.map(address, GRANULARITY, memory)
    driver.set_access(address, GRANULARITY, 0, writable=True)
    host = mmap.mmap(-1, 4096)
    start = ctypes.addressof(ctypes.c_char.from_buffer(host))
    stream = driver.stream()
    driver.register_host(start, 4096)
    emulator.hold()
    driver.copy_out(start, address, 64, stream)
    driver.unregister_host(start)
    emulator.go.set()
    with pytest.raises(DeviceLost, match="ILLEGAL_ADDRESS"):
        driver.synchronize(stream)


def test_a_context_is_current_in_the_thread_that_took_it(gpu: Context) -> None:
    gpu.bind()
    stream = gpu.driver.stream()
    failed: list[DeviceError] = []

    def elsewhere() -> None:
        try:
            gpu.driver.stream()
        except DeviceError as error:
            failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "INVALID_CONTEXT" in str(failed[0])
    gpu.driver.destroy_stream(stream)
