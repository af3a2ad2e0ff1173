"""Where weights go: the memory of a device, as arena segments."""

from __future__ import annotations

from coldframe.loader.devices.base import Device
from coldframe.loader.errors import DeviceError

__all__ = ["Device", "open_device"]


def open_device(name: str) -> Device:
    """The device of that name.

    Raises:
        DeviceError: There is none of that name.
    """
    if name == "cpu":
        from coldframe.loader.devices.cpu import CpuDevice

        return CpuDevice()
    raise DeviceError("unknown device", where=name, expected="cpu")
