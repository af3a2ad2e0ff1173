"""A GPU behind the protocol that the memory service knows devices by."""

from __future__ import annotations

import ctypes
import threading

import pytest

from coldframe.loader.devices import Device, open_device
from coldframe.loader.devices.base import Arena
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ArenaError, DeviceError, DeviceFull, NoDevice
from tests.loader.devices.emulator import GRANULARITY, Emulator


def test_devices_are_named() -> None:
    for name, found in (("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:3", "cuda:3")):
        device: Device = open_device(name)
        assert device.name == found
    for name in ("cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cudo"):
        with pytest.raises(DeviceError, match="unknown device"):
            open_device(name)


def mapped(device: CudaDevice, arena: Arena) -> DeviceReservation:
    """What another process sees of an arena."""
    found = device.mapping(arena.size)
    found.attach(arena.segments)
    return found


def test_memory_is_shared_by_descriptor(emulator: Emulator) -> None:
    device = CudaDevice(0, emulator)
    assert device.available() == 1 << 30
    arena = device.arena("weights", 3 * GRANULARITY + 1, now=True)
    assert arena.grown == arena.size == 4 * GRANULARITY
    assert device.available() == (1 << 30) - 4 * GRANULARITY
    assert [segment.writable for segment in arena.segments] == [False]
    assert arena.view(0, 1) is None
    other = mapped(device, arena)
    arena.write(3 * GRANULARITY, memoryview(bytearray(b"both")))
    assert ctypes.string_at(other.address + 3 * GRANULARITY, 4) == b"both"
    data = memoryview(bytearray(5))
    arena.read(3 * GRANULARITY, data)
    assert bytes(data[:4]) == b"both"
    with pytest.raises(ArenaError, match="no such memory"):
        arena.read(4 * GRANULARITY - 4, data)
    other.close()
    arena.close()
    assert device.available() == 1 << 30
    device.close()


def test_kv_has_memory_as_it_grows_and_gives_it_back(emulator: Emulator) -> None:
    device = CudaDevice(0, emulator)
    arena = device.arena("kv", 8 << 30, now=False)  # more than there is: addresses cost nothing
    assert (arena.grown, arena.segments) == (0, [])
    arena.grow(GRANULARITY + 1)
    arena.grow(GRANULARITY)
    assert arena.grown == 3 * GRANULARITY
    assert all(segment.writable for segment in arena.segments)
    other = mapped(device, arena)
    ctypes.memmove(other.address + 2 * GRANULARITY, b"theirs", 6)
    data = memoryview(bytearray(6))
    arena.read(2 * GRANULARITY, data)
    assert bytes(data) == b"theirs"
    assert arena.discard()
    other.detach()
    assert (arena.grown, arena.segments, device.available()) == (0, [], 1 << 30)
    arena.grow(GRANULARITY)
    other.attach(arena.segments)
    other.close()
    arena.close()
    device.close()


def test_more_than_there_is_is_refused(emulator: Emulator) -> None:
    device = CudaDevice(0, emulator)
    with pytest.raises(DeviceFull, match="not enough memory for the weights, in cuda:0"):
        device.arena("weights", 2 << 30, now=True)
    emulator.fail("cuMemCreate", code="CUDA_ERROR_OUT_OF_MEMORY")  # gone since it was asked
    with pytest.raises(DeviceFull, match="OUT_OF_MEMORY"):
        device.arena("weights", 1 << 20, now=True)
    device.close()


def test_it_comes_up_beside_all_else(emulator: Emulator) -> None:
    may_start, up = threading.Event(), threading.Event()
    start = emulator.cuInit

    def slowly(Flags: int) -> object:
        assert may_start.wait(60)
        return start(Flags)

    emulator.cuInit = slowly  # type: ignore[method-assign]
    device = CudaDevice(0, emulator)
    assert not device.start(up.set)
    assert not up.is_set()
    may_start.set()
    assert up.wait(60)
    assert device.available() == 1 << 30
    assert emulator.calls["cuInit"] == 1
    device.close()


def test_where_there_is_none_its_use_says_so() -> None:
    device, up = CudaDevice(0, Emulator(library=False)), threading.Event()
    device.start(up.set)
    assert up.wait(60)
    for use in (device.available, lambda: device.arena("kv", 1, now=False)):
        with pytest.raises(NoDevice, match="no CUDA driver"):
            use()
    device.close()
