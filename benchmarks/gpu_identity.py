"""Which GPU it is: asked in a process of its own, so that this one never has a driver open.

Whoever keeps one open makes the next start of it faster, and a cold start is to be measured cold.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from coldframe.loader.devices.checkpoint_calls import CheckpointCalls
from coldframe.loader.devices.driver import Driver
from coldframe.loader.errors import ColdframeError

__all__ = ["entry", "gpu_identity", "main"]

_MODULE_VERSION = Path("/sys/module/nvidia/version")


def entry(ordinal: int) -> str:
    """What an interpreter runs to be that process; it writes to descriptor 3."""
    return f"from coldframe.benchmarks.gpu_identity import main; main(3, {ordinal})"


def gpu_identity(ordinal: int, api: Any = None) -> dict[str, Any]:
    """Asks the driver; no context is made.

    Args:
        ordinal: The GPU's.
        api: See `Driver`; None takes the bindings.

    Returns:
        `gpu`, its name; `gpu_uuid`; `gpu_driver`, the kernel module's version where that is told;
        `cuda`, the version that the driver is made for. Or `error`.
    """
    try:
        driver = Driver.open(api)
        name, version = driver.device_name(ordinal), driver.version()
        uuid = CheckpointCalls(driver).uuid(ordinal)
    except ColdframeError as error:
        return {"error": error.to_wire()}
    try:
        module = _MODULE_VERSION.read_text().strip() or None
    except OSError:
        module = None
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    return {"gpu": name, "gpu_uuid": uuid, "gpu_driver": module, "cuda": cuda}


def main(fd: int, ordinal: int) -> None:
    """The process's entry: writes what is found to a descriptor."""
    with os.fdopen(fd, "w") as file:
        json.dump(gpu_identity(ordinal), file)
