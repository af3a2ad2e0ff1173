"""Another process's CUDA context, taken off the GPU and brought back: by a helper that stays.

The helper is a process with a context of its own, since a driver takes seconds to start in one that
has none. What it freezes goes on living on the host, blocked in whatever call it makes next, or can
be written to an image. It must have let go of all memory that it shares with others.

After an error the process is one of two things. It is where it was, and the error says what is
wrong; or nothing is certain any more, and the error is `ContextPoisoned`: then it must be killed.
What can be known beforehand to be in vain is not begun: a GPU without room (`DeviceFull`, to be
tried again) or other GPUs than there were (`AnotherDevice`).
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from coldframe.loader.cgroup import memory_available
from coldframe.loader.devices.checkpoint_calls import CheckpointCalls, ProcessState
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver_errors import code_of
from coldframe.loader.errors import (
    AnotherDevice,
    ContextPoisoned,
    DeviceError,
    DeviceFull,
    NoCheckpoint,
    ReplicaError,
)
from coldframe.loader.memory_service.contextdesk import LOCK_S, Frozen
from coldframe.snapshot.gpu_pairs import KERNEL_GPUS, gpu_pairs, hidden_gpus

__all__ = ["CONTEXT_BYTES", "Checkpoints", "Frozen", "LOCK_S"]

CONTEXT_BYTES = 512 << 20
"""What a context takes of a GPU besides what its process has asked for: torch's kernels are most of
it. Nobody can say it exactly, and it is better to say too much: who comes back to a GPU with too
little left is lost."""
_MARGIN = 1 << 30
"""How much more than it says a process may have, and what the host must have left behind it: one
that is killed for memory meanwhile would take more with it than itself."""
_HOPELESS = ("CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_NOT_PERMITTED")
"""What the lock is refused with where none of this machine's processes can be frozen."""


class Checkpoints:
    """What freezes and thaws contexts on one GPU. Any thread may use it; one is served at a time.

    Args:
        context: The helper's, on the GPU that the processes compute on.
        kernel_gpus: Where the kernel's driver lists its GPUs.
        available: Says how much memory the host has left, in bytes.
    """

    def __init__(
        self,
        context: Context,
        kernel_gpus: str = KERNEL_GPUS,
        available: Callable[[], int] = memory_available,
    ) -> None:
        self._context = context
        self._calls = CheckpointCalls(context.driver)
        self._kernel_gpus = kernel_gpus
        self._available = available
        self._turn = threading.Lock()
        self._held: dict[int, int] = {}
        """A pidfd of each process that is frozen: its number may become another one's."""

    def supported(self) -> str | None:
        """Why nothing can be frozen here; None where there is nothing that says so."""
        return self._calls.supported()

    def uuids(self) -> dict[str, str]:
        """What each GPU is called, by its UUID; the context's own first.

        A move must name all that the kernel's driver has, also those that are hidden from us.
        """
        driver, own = self._context.driver, self._context.ordinal
        others = [ordinal for ordinal in range(driver.device_count()) if ordinal != own]
        seen = {self._calls.uuid(n): driver.device_name(n) for n in (own, *others)}
        return seen | {k: v for k, v in hidden_gpus(self._kernel_gpus).items() if k not in seen}

    def freeze(self, pid: int, limit_s: float = LOCK_S, own_bytes: int = 0) -> Frozen:
        """Takes a process's context off the GPU.

        Args:
            pid: The process. It has let go of all memory that it shares.
            limit_s: How long what it is doing may take, in seconds.
            own_bytes: What it says that it has of the GPU's memory for itself.

        Raises:
            NoCheckpoint: That cannot be done here; the process goes on.
            DeviceError: It could not be done; the process goes on.
            ReplicaError: The process is gone.
            ContextPoisoned: The process must be killed.
        """
        with self._turn:
            self._check_supported()
            said = own_bytes + CONTEXT_BYTES
            self._check_host(said + _MARGIN)
            uuids = self.uuids()
            self._sweep()
            self._release(pid)  # what was frozen under that number is of no interest any more
            self._held[pid] = _pidfd(pid)
            try:
                started = time.monotonic()
                free = self._context.available()
                self._take_off(pid, limit_s)
            except BaseException:
                self._release(pid)
                raise
            measured = 0
            with suppress(DeviceError):  # it has left all the same
                measured = self._context.available() - free
            # Others take memory of the GPU meanwhile, and give some back.
            taken = max(said, min(measured, said + _MARGIN))
            return Frozen(taken, uuids, time.monotonic() - started)

    def _take_off(self, pid: int, limit_s: float) -> None:
        try:
            self._calls.lock(pid, limit_s)
        except DeviceError as error:
            self._take_back(pid, error, begun=False)
        try:
            self._calls.checkpoint(pid)
        except DeviceError as error:
            self._take_back(pid, error, begun=True)

    def _take_back(self, pid: int, error: DeviceError, *, begun: bool) -> None:
        """Lets a process go on that could not be frozen, or finds that it cannot; raises."""
        if _has_ended(self._held[pid]):
            raise _gone(pid) from error
        try:
            state = self._calls.state(pid)
        except DeviceError:
            # Of a process that was not even stopped, it need not have a context.
            state = ProcessState.OTHER if begun else ProcessState.RUNNING
        if state is ProcessState.LOCKED:
            with suppress(DeviceError):
                self._calls.unlock(pid)
                state = ProcessState.RUNNING
        if state is not ProcessState.RUNNING:
            raise _poisoned("freezing", pid, state, error) from error
        if not begun and code_of(error) in _HOPELESS:
            raise NoCheckpoint(error.what, where=error.where, got=error.got) from error
        raise error

    def thaw(self, pid: int, frozen: Frozen) -> float:
        """Brings a process's context back, and lets the process go on.

        Args:
            pid: The process: the one that was frozen here, or one that an image has become.
            frozen: What `freeze` said of it.

        Returns:
            How long it took, in seconds.

        Raises:
            DeviceFull: The GPU has no room for it now. Nothing was touched: try again.
            AnotherDevice: There are other GPUs than there were. Nothing was touched.
            NoCheckpoint: That cannot be done here.
            ReplicaError: The process is gone.
            ContextPoisoned: The process must be killed.
        """
        with self._turn:
            self._check_supported()
            if pid not in self._held:
                self._held[pid] = _pidfd(pid)
            if _has_ended(self._held[pid]):
                self._release(pid)
                raise _gone(pid)
            pairs = self._pairs(frozen)
            self._check_room(pid, frozen)
            started = time.monotonic()
            try:
                self._bring_back(pid, pairs)
            finally:
                self._release(pid)
            return time.monotonic() - started

    def _bring_back(self, pid: int, pairs: dict[str, str] | None) -> None:
        state = ProcessState.OTHER
        try:
            state = self._calls.state(pid)
            if state is not ProcessState.CHECKPOINTED:
                raise DeviceError(
                    "the context is not where it was left",
                    expected=ProcessState.CHECKPOINTED.value,
                    got=state.value,
                )
            self._calls.restore(pid, pairs)
            self._calls.unlock(pid)
        except DeviceError as error:
            if _has_ended(self._held[pid]):
                raise _gone(pid) from error
            with suppress(DeviceError):
                state = self._calls.state(pid)
            raise _poisoned("thawing", pid, state, error) from error

    def _check_room(self, pid: int, frozen: Frozen) -> None:
        free = self._context.available()
        if free < frozen.bytes:
            raise DeviceFull(
                "the GPU has no room for a context that is to come back",
                where=f"{self._context.name}, process {pid}",
                expected=f"{frozen.bytes:,} bytes",
                got=f"{free:,} bytes available",
                hint="Free memory of the GPU (nvidia-smi).",
            )

    def _pairs(self, frozen: Frozen) -> dict[str, str] | None:
        pairs = gpu_pairs(frozen.uuids, self.uuids())
        if pairs is not None and not self._calls.can_move:
            raise AnotherDevice(
                "these cuda-bindings cannot move a context to another GPU",
                where="CUcheckpointRestoreArgs",
                expected="gpuPairs",
                hint="Update cuda-bindings.",
            )
        return pairs

    def forget(self, pid: int) -> None:
        """A process that is frozen will not be thawed here."""
        with self._turn:
            self._release(pid)

    def close(self) -> None:
        """Lets all of them go. They stay as they are."""
        with self._turn:
            for pid in list(self._held):
                self._release(pid)

    def _sweep(self) -> None:
        """Lets those go that are gone."""
        for pid in [pid for pid, fd in self._held.items() if _has_ended(fd)]:
            self._release(pid)

    def _release(self, pid: int) -> None:
        fd = self._held.pop(pid, None)
        if fd is not None:
            os.close(fd)

    def _check_host(self, wanted: int) -> None:
        left = self._available()
        if left < wanted:
            raise DeviceError(
                "the host has no memory for a context",
                where=self._context.name,
                expected=f"{wanted:,} bytes",
                got=f"{left:,} available",
                hint="Give the container more memory, or leave contexts where they are "
                "(--checkpoint off).",
            )

    def _check_supported(self) -> None:
        why = self._calls.supported()
        if why is not None:
            raise NoCheckpoint("contexts cannot be checkpointed", where=self._context.name, got=why)


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise _gone(pid, error.strerror) from error


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _gone(pid: int, got: Any = None) -> ReplicaError:
    return ReplicaError("the process is gone", where=f"process {pid}", got=got)


def _poisoned(doing: str, pid: int, state: ProcessState, error: DeviceError) -> ContextPoisoned:
    return ContextPoisoned(
        f"{doing} a context failed half-way, and the process is of no use any more: {error.what}",
        where=error.where or f"process {pid}",
        expected=error.expected,
        got=f"{error.got or error.what}; the process is {state.value}",
    )
