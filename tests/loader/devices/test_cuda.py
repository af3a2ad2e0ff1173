"""A GPU behind the protocol that the memory service knows devices by."""

from __future__ import annotations

import ctypes
import os
import threading

import pytest

from coldframe.loader.arena import PAGE, Segment
from coldframe.loader.devices import Device, open_device
from coldframe.loader.devices.copies import Copy
from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.ring import Ring
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ColdframeError, DeviceError, DeviceFull, NoDevice
from tests.loader.devices.emulator import GRANULARITY, Emulator


def test_devices_are_named() -> None:
    for name, found in (("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:3", "cuda:3")):
        device: Device = open_device(name)
        assert device.name == found
    for name in ("cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cudo"):
        with pytest.raises(DeviceError, match="unknown device"):
            open_device(name)


@pytest.mark.parametrize("now", [False, True])
def test_memory_is_shared_by_descriptor(emulator: Emulator, now: bool) -> None:
    device = CudaDevice(0, emulator)
    assert device.available() == 1 << 30
    fd = device.allocate("test", 3 * GRANULARITY + 1, now=now)
    assert device.available() == (1 << 30) - 4 * GRANULARITY
    one, two = (DeviceReservation(device.context, 4 * GRANULARITY) for _ in range(2))
    for view in (one, two):
        view.attach([Segment(fd, 0, 4 * GRANULARITY, 0, True)])
    os.close(fd)
    if not now:
        assert ctypes.string_at(one.address, 8) == bytes(8)
    ctypes.memmove(one.address + 3 * GRANULARITY, b"both", 4)
    assert ctypes.string_at(two.address + 3 * GRANULARITY, 4) == b"both"
    one.close()
    two.close()
    assert device.available() == 1 << 30
    device.close()


def test_more_than_there_is_is_refused(emulator: Emulator) -> None:
    device = CudaDevice(0, emulator)
    with pytest.raises(DeviceFull, match="not enough memory for the weights, in cuda:0"):
        device.allocate("weights", 2 << 30, now=True)
    emulator.fail("cuMemCreate", code="CUDA_ERROR_OUT_OF_MEMORY")  # gone since it was asked
    with pytest.raises(DeviceFull, match="OUT_OF_MEMORY"):
        device.allocate("weights", 1 << 20, now=True)
    device.close()


def test_memory_that_is_mapped_cannot_be_discarded(emulator: Emulator) -> None:
    with pytest.raises(DeviceError, match="cannot be given back while it is mapped"):
        CudaDevice(0, emulator).discard(0, 1)


def test_a_ring_is_fed_into_it_once_it_is_up(emulator: Emulator) -> None:
    may_start = threading.Event()
    start = emulator.cuInit

    def slowly(Flags: int) -> object:
        assert may_start.wait(60)
        return start(Flags)

    emulator.cuInit = slowly  # type: ignore[method-assign]
    device, ring, told = CudaDevice(0, emulator), Ring(2, PAGE), threading.Event()
    device.feed(ring)
    with ring.transfer().slot() as slot:  # while the driver starts
        slot.view[:5] = b"early"
        waiting = slot
        may_start.set()
        arena = DeviceArena(device.context, GRANULARITY, writable=False)
        arena.grow(GRANULARITY)

        def arrived(error: ColdframeError | None) -> None:
            assert error is None
            told.set()

        waiting.submit([Copy(arena.address, 0, 5)], arrived)
    assert told.wait(60)
    assert ctypes.string_at(arena.address, 5) == b"early"
    ring.close()
    arena.close()
    device.close()


def test_a_ring_into_a_gpu_that_is_not_there_ends_with_the_reason() -> None:
    device, ring = CudaDevice(0, Emulator(library=False)), Ring(1, PAGE)
    device.feed(ring)
    device.close()
    with pytest.raises(NoDevice, match="no CUDA driver"):
        ring.transfer().slot()
    ring.close()
