"""The memory service's entry: with what it takes to freeze its workers' contexts.

It starts first of all processes and in the least time, so that what a context takes is imported
when the first one is to be frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldframe.loader.service import main as serve

if TYPE_CHECKING:
    from coldframe.loader.contextdesk import Contexts
    from coldframe.loader.devices.base import Device

__all__ = ["main", "open_contexts"]


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


def main(owner_fd: int, run_dir: str, spawned_ns: int, first_ns: int) -> None:
    """The process's entry; see `loader.service.main`."""
    serve(owner_fd, run_dir, spawned_ns, first_ns, open_contexts)
