"""Copies from locked host memory to the first GPU, for a moment: run as a process of its own."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from coldframe.loader.errors import ColdframeError, DeviceError

__all__ = ["main", "measure"]

_BYTES = 128 << 20
_ROUNDS = 8


def measure() -> dict[str, Any]:
    """`bytes_per_s`, the best of some copies, or `error`."""
    try:
        import torch

        host = torch.empty(_BYTES, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(_BYTES, dtype=torch.uint8, device="cuda:0")
        best = 0.0
        for _ in range(_ROUNDS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            there.copy_(host, non_blocking=True)
            torch.cuda.synchronize()
            best = max(best, _BYTES / (time.perf_counter() - started))
    except (ImportError, RuntimeError) as error:
        broke: ColdframeError = DeviceError(
            "nothing can be copied to the GPU", got=str(error).splitlines()[0]
        )
        return {"error": broke.to_wire(), "bytes_per_s": None}
    return {"error": None, "bytes_per_s": best}


def main(fd: int) -> None:
    """The process's entry: writes what it measured to a descriptor."""
    with os.fdopen(fd, "w") as file:
        json.dump(measure(), file)
