"""What the memory service is given to freeze its workers' contexts with.

The service starts first of all processes and in the least time, so what this takes is imported when
the first context is to be frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coldframe.loader.devices.base import Device
    from coldframe.loader.memory_service.contextdesk import Contexts

__all__ = ["open_contexts"]


def open_contexts(device: Device) -> Contexts:
    """What freezes and thaws contexts on a device.

    Raises:
        NoCheckpoint: It is no GPU.
        DeviceError: It cannot be used.
    """
    from coldframe.loader.devices.cuda import CudaDevice
    from coldframe.loader.errors import NoCheckpoint
    from coldframe.snapshot.cuda import Checkpoints

    if not isinstance(device, CudaDevice):
        raise NoCheckpoint("only a GPU has contexts", where=device.name, hint="")
    return Checkpoints(device.context)
