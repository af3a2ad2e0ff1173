"""Where weights go: the memory of a device, as arena segments."""

from __future__ import annotations

from coldframe.loader.devices.base import Device
from coldframe.loader.errors import DeviceError

__all__ = ["Device", "open_device"]


def open_device(name: str) -> Device:
    """The device of that name: `cpu`, `cuda` or `cuda:N`.

    Whether there is such a GPU shows when it is first used.

    Raises:
        DeviceError: There is none of that name.
    """
    if name == "cpu":
        from coldframe.loader.devices.cpu import CpuDevice

        return CpuDevice()
    kind, colon, number = name.partition(":")
    if kind == "cuda" and (number.isascii() and number.isdecimal() if colon else True):
        from coldframe.loader.devices.cuda import CudaDevice

        return CudaDevice(int(number or 0))
    raise DeviceError("unknown device", where=name, expected="cpu, cuda or cuda:N")
