"""Can a process be checkpointed and restored that has memory of another one; see `questions`.

The process that is asked drives: it has the memory. A second one imports it, and is checkpointed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from importlib import import_module
from typing import Any

from coldframe.benchmarks.gpu.questions import up
from coldframe.loader.arena import WEIGHTS_BASE, Segment
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ColdframeError

__all__ = ["checkpoint_mapped", "checkpoint_unmapped"]

_PIECE = 4 << 20


def checkpoint_unmapped(ordinal: int) -> dict[str, str]:
    return _checkpoint(ordinal, mapped=False)


def checkpoint_mapped(ordinal: int) -> dict[str, str]:
    return _checkpoint(ordinal, mapped=True)


def _checkpoint(ordinal: int, *, mapped: bool) -> dict[str, str]:
    """Checkpoints and restores a process that has imported memory of this one."""
    api: Any = import_module("cuda.bindings.driver")
    context = up(ordinal)
    if not context.driver.has("cuCheckpointProcessLock"):
        return {"calls": "the driver has none for it"}
    arena = DeviceArena(context, _PIECE, writable=False)
    fd = arena.grow(arena.size).fd
    os.set_inheritable(fd, True)
    command = [sys.executable, "-P", "-m", __name__, str(ordinal), str(fd), str(int(mapped))]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(fd,),
    )
    try:
        return _drive(api, child)
    finally:
        child.kill()
        child.wait()


def _drive(api: Any, child: subprocess.Popen[str]) -> dict[str, str]:
    assert child.stdin is not None
    assert child.stdout is not None
    found = {"before": child.stdout.readline().strip()}
    steps = (
        ("lock", api.cuCheckpointProcessLock, api.CUcheckpointLockArgs()),
        ("checkpoint", api.cuCheckpointProcessCheckpoint, None),
        ("restore", api.cuCheckpointProcessRestore, None),
        ("unlock", api.cuCheckpointProcessUnlock, None),
    )
    for name, call, arguments in steps:
        if arguments is not None:
            arguments.timeoutMs = 5000
        started = time.perf_counter()
        (code,) = call(child.pid, arguments)
        seconds = time.perf_counter() - started
        found[name] = f"{code.name} in {seconds:.3f} s"
        if code != api.CUresult.CUDA_SUCCESS:
            return found
    child.stdin.write("go\n")
    child.stdin.flush()
    found["behind it"] = child.stdout.readline().strip()
    return found


def _target(argv: list[str]) -> None:
    """The process that is checkpointed: imports, lets go unless it is to keep, and maps again."""
    ordinal, fd, mapped = int(argv[1]), int(argv[2]), argv[3] == "1"
    context = up(ordinal)
    segment = Segment(fd, 0, _PIECE, 0, False)
    reservation = DeviceReservation(context, _PIECE, WEIGHTS_BASE)
    reservation.attach([segment])
    if not mapped:
        reservation.detach()
    print(f"at {reservation.address:#x}", flush=True)
    sys.stdin.readline()
    try:
        if not mapped:
            reservation.attach([segment])
        stream, back = context.driver.stream(), ctypes.create_string_buffer(4)
        context.driver.copy_out(ctypes.addressof(back), reservation.address, 4, stream)
        context.driver.synchronize(stream)
        print(f"mapped again at {reservation.address:#x}, and read", flush=True)
    except ColdframeError as error:
        print(f"{error}", flush=True)


if __name__ == "__main__":
    _target(sys.argv)
