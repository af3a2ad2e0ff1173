"""What the GPUs here can do, as JSON: for whoever must not load a driver, nor be ended by one.

Run as a process of its own. It makes a context on each GPU, since whether one can be had shows by
nothing less; that takes a second.
"""

from __future__ import annotations

import json
import os
from typing import Any

from coldframe.loader.devices.checkpoint_calls import CheckpointCalls
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import NEEDED, Driver
from coldframe.loader.errors import ColdframeError

__all__ = ["ENTRY", "gpu_report", "main"]

ENTRY = "from coldframe.loader.devices.report import main; main(3)"
"""What an interpreter runs to be that process."""


def gpu_report(api: Any = None) -> dict[str, Any]:
    """Asks the driver.

    Args:
        api: See `Driver`; None takes the bindings.

    Returns:
        `error`, why there is no driver to be used, or None; `driver`, the CUDA version that it is
        made for; `calls`, whether it has those that arenas (`arenas`) and a checkpoint of a process
        (`checkpoint`) are made with, and else `checkpoint_why` not; and `gpus`, each with `device`,
        `name`, `total` and `free` bytes, or `error`.
    """
    found: dict[str, Any] = {"error": None, "driver": None, "calls": {}, "gpus": []}
    try:
        driver = Driver.open(api)
        found["driver"] = _dotted(driver.version())
        why_not = CheckpointCalls(driver).supported()
        found["calls"] = {
            "arenas": all(map(driver.has, NEEDED)),
            "checkpoint": why_not is None,
            "checkpoint_why": why_not,
        }
        found["gpus"] = [_gpu(driver, ordinal) for ordinal in range(driver.device_count())]
    except ColdframeError as error:
        found["error"] = error.to_wire()
    return found


def _gpu(driver: Driver, ordinal: int) -> dict[str, Any]:
    found: dict[str, Any] = {"device": f"cuda:{ordinal}", "name": None, "error": None}
    try:
        found["name"] = driver.device_name(ordinal)
        context = Context(driver, ordinal)
        try:
            context.bind()
            found["free"], found["total"] = driver.memory_info()
        finally:
            context.close()
    except ColdframeError as error:
        found["error"] = error.to_wire()
    return found


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def main(fd: int) -> None:
    """The process's entry: writes the report to a descriptor."""
    with os.fdopen(fd, "w") as file:
        json.dump(gpu_report(), file)
