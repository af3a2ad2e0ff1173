"""The device that a plan is for, and what it has: asked before anything is loaded there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from coldframe.loader.cgroup import memory_available
from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.devices.report import ENTRY
from coldframe.loader.errors import ColdframeError, NoDevice
from coldframe.loader.kv.room import KvRoom
from coldframe.runtime.engine.spec import ModelSpec
from coldframe.runtime.machine.device_choice import CPU, DeviceChoice
from coldframe.runtime.machine.side_process import ask
from coldframe.runtime.options import ReplicaOptions
from coldframe.runtime.planning.prediction import MemoryPrediction, predict_memory
from coldframe.runtime.replica.sizing import CONTEXT_BYTES, KvSize, kv_blocks

__all__ = ["GPU_OVERHEAD", "Target", "devices_here", "kernel_module"]

_PROCESSES = 3
"""Who has a context on a GPU: the memory service, and a worker for each role."""
GPU_OVERHEAD = _PROCESSES * CONTEXT_BYTES
"""What they take of it, before anything is measured."""


class Target(NamedTuple):
    """A device.

    Attributes:
        choice: Which, and why.
        available: Bytes of it that nobody has.
        gpu: What the driver says of it, see `loader.devices.report`, and the driver's versions
            (`driver`, `kernel_module`).
    """

    choice: DeviceChoice
    available: int
    gpu: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, choice: DeviceChoice) -> Target:
        """Asks for what there is; the CPU stands in where that may be.

        Raises:
            NoDevice: There is no such GPU.
            DeviceError: It cannot be used.
        """
        if choice.device != CPU:
            try:
                gpu = _ask(choice.device)
            except ColdframeError as error:
                if not choice.fall_back:
                    raise
                choice = DeviceChoice(CPU, f"{choice.device} cannot be used: {error}")
            else:
                return cls(choice, gpu["free"], gpu)
        return cls(choice, memory_available())

    def predict(self, plan: Plan, spec: ModelSpec, *, context: int, batch: int) -> MemoryPrediction:
        """The memory of a replica; see `predict_memory`."""
        if self.gpu is None:
            return predict_memory(plan, spec, context=context, batch=batch)
        return predict_memory(plan, spec, context=context, batch=batch, overhead=GPU_OVERHEAD)

    def kv_default(self, plan: Plan, spec: ModelSpec) -> int:
        """The KV that a replica takes where nobody says, in bytes."""
        if self.gpu is None:
            block, blocks = kv_blocks(spec, None, self.available)
            return block * blocks
        size = KvSize.of(spec, ReplicaOptions("", device=self.choice.device))
        room = size.room or KvRoom()
        return room.nbytes(self.gpu["total"], self.available, plan.arena_bytes)


def devices_here() -> list[str]:
    """The CPU, and every GPU that its driver tells of."""
    found = ask(ENTRY, "GPUs")
    return [CPU, *(gpu["device"] for gpu in found["gpus"])]


def kernel_module(root: str | Path = "/") -> str | None:
    """The version of the GPU driver's part in the kernel, where there is one."""
    try:
        text = (Path(root) / "proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", text)
    return None if found is None else found[0]


def _ask(device: str) -> Mapping[str, Any]:
    found = ask(ENTRY, "GPUs")
    if found["error"] is not None:
        raise ColdframeError.from_wire(found["error"])
    for gpu in found["gpus"]:
        if gpu["device"] == device:
            if gpu["error"] is not None:
                raise ColdframeError.from_wire(gpu["error"])
            return {**gpu, "driver": found.get("driver"), "kernel_module": kernel_module()}
    raise NoDevice(
        "there is no such GPU",
        where=device,
        expected=", ".join(gpu["device"] for gpu in found["gpus"]) or "none",
        hint="Name a GPU that this process can see (CUDA_VISIBLE_DEVICES, nvidia-smi).",
    )
