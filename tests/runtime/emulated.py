"""Processes of a replica whose GPU is emulated, on machines without one.

Device memory is a memfd that is mapped at the device's addresses, and torch takes it for the CPU's:
so weights and KV go all the way that they go on a GPU, and what computes is the CPU.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from coldframe.runtime import early, launch
from coldframe.runtime.replica import Replica
from tests.loader.devices.emulator import MEMFD

__all__ = ["device_bytes", "emulate_gpus"]

_EMULATING = """
import sys
sys.path.insert(0, {root!r})
from coldframe.loader.packages import add_site_packages
add_site_packages()
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.vmm import DeviceReservation
from tests.loader.devices.emulator import Emulator

emulator, plain = Emulator({memory}, delay={delay}), Driver.open.__func__
Driver.open = classmethod(lambda cls, api=None: plain(cls, api or emulator))
DeviceReservation.dlpack_device = property(lambda self: (1, 0))
"""


def emulate_gpus(patch: pytest.MonkeyPatch, memory: int = 4 << 30, delay: float = 0.0) -> None:
    """Has memory services and workers find an emulated GPU.

    Args:
        patch: Undoes it.
        memory: What the GPU has, as each process sees it: others' is not counted.
        delay: Seconds that each copy to or from it takes.
    """
    root = str(Path(__file__).parents[2])
    code = _EMULATING.format(root=root, memory=memory, delay=delay)
    for module, name in ((early, "_MAIN"), (launch, "_WORKER")):
        patch.setattr(module, name, f"exec({code!r}); {getattr(module, name)}")


def device_bytes(replica: Replica) -> int:
    """Memory of the GPU that is not free, since some process has it open or mapped."""
    sizes: dict[int, int] = {}
    for pid in replica.pids.values():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if f"/memfd:{MEMFD}" in os.readlink(fd):
                    status = fd.stat()
                    sizes[status.st_ino] = status.st_size
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if f"/memfd:{MEMFD}" in line:
                words = line.split()
                begin, end = (int(part, 16) for part in words[0].split("-"))
                sizes.setdefault(int(words[4]), end - begin)
    return sum(sizes.values())
