"""The driver's calls that take a process's context off its GPUs and bring it back: typed.

    RUNNING ── lock ─> LOCKED ── checkpoint ─> CHECKPOINTED
    RUNNING <─ unlock ─ LOCKED <── restore ──────── ┘             FAILED: nothing leads out of that

The process that they are about is another one, which notices nothing but that its calls wait while
it is not RUNNING. What is copied to its host memory is the context and all that it has allocated;
memory that it shares with others it must have let go of.

Whether bindings and driver have the calls, and whether they can move a context to another GPU, is
asked, not concluded from their versions.
"""

from __future__ import annotations

import ctypes
import uuid
from collections.abc import Mapping
from enum import Enum
from typing import Any

from coldframe.loader.devices.driver import Driver

__all__ = ["CALLS", "CheckpointCalls", "ProcessState"]

CALLS = (
    "cuCheckpointProcessLock",
    "cuCheckpointProcessCheckpoint",
    "cuCheckpointProcessRestore",
    "cuCheckpointProcessUnlock",
    "cuCheckpointProcessGetState",
)
"""Without all of these there is nothing to begin with."""

_UUID = "GPU-"


class ProcessState(Enum):
    """Where a process's context is; the names are the driver's."""

    RUNNING = "RUNNING"
    LOCKED = "LOCKED"
    CHECKPOINTED = "CHECKPOINTED"
    FAILED = "FAILED"
    OTHER = "OTHER"
    """One that only calls lead to which are not made here, or that a newer driver has."""


class CheckpointCalls:
    """The calls about other processes' contexts. Any thread may make them; they may take seconds.

    Args:
        driver: Whose.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._api = driver.api

    def supported(self) -> str | None:
        """Why contexts cannot be checkpointed; None where bindings and driver have the calls."""
        in_bindings = [name for name in CALLS if getattr(self._api, name, None) is None]
        if in_bindings:
            return f"cuda-bindings have no {', '.join(in_bindings)}"
        in_driver = [name for name in CALLS if not self._driver.has(name)]
        return f"the driver has no {', '.join(in_driver)}" if in_driver else None

    @property
    def can_move(self) -> bool:
        """Whether a context can be restored on another GPU than it was on."""
        arguments = getattr(self._api, "CUcheckpointRestoreArgs", None)
        pair = getattr(self._api, "CUcheckpointGpuPair", None)
        return pair is not None and hasattr(arguments, "gpuPairs")

    def state(self, pid: int) -> ProcessState:
        """Where a process's context is.

        Raises:
            DeviceError: It has none, or is out of reach.
        """
        state = self._call("the driver does not know the process", "GetState", pid)
        name = state.name.removeprefix("CU_PROCESS_STATE_")
        return ProcessState[name] if name in ProcessState.__members__ else ProcessState.OTHER

    def lock(self, pid: int, limit_s: float) -> None:
        """Has a process make no further calls.

        Args:
            pid: Which process.
            limit_s: How long what it is doing may take; it stays RUNNING where that is longer.
        """
        arguments = self._api.CUcheckpointLockArgs()
        arguments.timeoutMs = max(1, round(limit_s * 1000))  # 0 would be for ever
        self._call("the process cannot be stopped", "Lock", pid, arguments)

    def checkpoint(self, pid: int) -> None:
        """Has a LOCKED process's context leave its GPUs."""
        self._call("the context cannot leave the GPU", "Checkpoint", pid, None)

    def restore(self, pid: int, pairs: Mapping[str, str] | None = None) -> None:
        """Brings a context back; the process is LOCKED then.

        Args:
            pid: Whose.
            pairs: The UUID of each GPU that there was, and of the one that takes its place; None
                where each is the same.
        """
        arguments = None
        if pairs is not None:
            arguments = self._api.CUcheckpointRestoreArgs()
            arguments.gpuPairs = [self._pair(old, new) for old, new in pairs.items()]
            arguments.gpuPairsCount = len(pairs)  # which the bindings do not do by themselves
        self._call("the context cannot come back to the GPU", "Restore", pid, arguments)

    def unlock(self, pid: int) -> None:
        """Lets a LOCKED process go on."""
        self._call("the process cannot go on", "Unlock", pid, None)

    def uuid(self, ordinal: int) -> str:
        """What tells a GPU from all others, as nvidia-smi writes it."""
        what = "the GPU has no UUID"
        device = self._driver.call("there is no such GPU", "cuDeviceGet", ordinal)
        found = self._driver.call(what, "cuDeviceGetUuid", device, where=f"cuda:{ordinal}")
        return f"{_UUID}{uuid.UUID(bytes=bytes(found.bytes))}"

    def _pair(self, old: str, new: str) -> object:
        pair = self._api.CUcheckpointGpuPair()
        pair.oldUuid, pair.newUuid = self._to_driver(old), self._to_driver(new)
        return pair

    def _to_driver(self, name: str) -> object:
        found = self._api.CUuuid()
        # The bindings let nobody write its bytes, though there are UUIDs that no device here has.
        ctypes.memmove(found.getPtr(), uuid.UUID(name.removeprefix(_UUID)).bytes, 16)
        return found

    def _call(self, what: str, name: str, pid: int, *arguments: object) -> Any:
        function = f"cuCheckpointProcess{name}"
        return self._driver.call(what, function, pid, *arguments, where=f"process {pid}")
