"""What is asked of a machine's driver and torch; one function a question, its answer is JSON.

`python -m coldframe.benchmarks.gpu.questions MODULE NAME DEVICE` prints it as the last line. Each
runs in a process of its own: some end in a GPU context that is lost, which is the answer.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from importlib import import_module
from typing import Any

from coldframe.loader.arena import KV_BASE, WEIGHTS_BASE, Segment
from coldframe.loader.devices.checkpoint_calls import CALLS
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.device_arena import DeviceArena
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.graph_calls import READING, REBUILDING
from coldframe.loader.devices.vmm import DeviceReservation
from coldframe.loader.errors import ColdframeError, DeviceError

__all__ = ["main", "up"]

_CALLS = (
    *CALLS,
    "cuCheckpointProcessGetRestoreThreadId",
    *READING,
    *REBUILDING,
    "cuFuncGetModule",
    "cuKernelGetLibrary",
    "cuLibraryLoadData",
    "cuModuleEnumerateFunctions",
    "cuMemcpyBatchAsync",
    "cuMulticastCreate",
)
_LARGE = 16 << 30
_PIECE = 4 << 20


def main(argv: list[str]) -> int:
    """Answers one question.

    Args:
        argv: The module that has it, its name, the device.
    """
    module, name, device = argv
    answer = getattr(import_module(module), name)(int(device.rpartition(":")[2]))
    print(json.dumps(answer), flush=True)
    # Not through what torch and the driver do at exit: a lost context may hang there.
    os._exit(0)


def up(ordinal: int) -> Context:
    """A GPU's context, current in this thread; it goes with the process."""
    context = Context(Driver.open(), ordinal)
    context.bind()
    return context


def driver_calls(ordinal: int) -> dict[str, Any]:
    context = up(ordinal)
    calls = {name: context.driver.has(name) for name in dict.fromkeys(_CALLS)}
    has = [name for name, there in calls.items() if there]
    lacks = [name for name, there in calls.items() if not there]
    return {"has": has or "none of them", "lacks": lacks or "none of them"}


def start(ordinal: int) -> dict[str, float]:
    """What the first steps of a process take."""
    started = time.perf_counter()
    api: Any = import_module("cuda.bindings.driver")
    imported = time.perf_counter()
    api.cuInit(0)
    initialised = time.perf_counter()
    Context(Driver.open(), ordinal).bind()
    return {
        "bindings": imported - started,
        "cuInit": initialised - imported,
        "context": time.perf_counter() - initialised,
    }


def addresses(ordinal: int) -> dict[str, str]:
    context = up(ordinal)
    found = {}
    for name, wanted in (("weights", WEIGHTS_BASE), ("KV", KV_BASE)):
        try:
            DeviceReservation(context, _LARGE, wanted, exact=True)
            found[name] = f"{wanted:#x}, as wanted"
        except ColdframeError as error:
            found[name] = f"not {wanted:#x}: {error.got}"
    return found


def addresses_with_torch(ordinal: int) -> dict[str, str]:
    import torch

    torch.ones(1 << 20, device=f"cuda:{ordinal}").sum().item()
    return addresses(ordinal)


def _twice(ordinal: int, *, writable: bool) -> tuple[DeviceArena, DeviceReservation]:
    """Memory mapped twice: by its owner, and again as others map it."""
    context = up(ordinal)
    arena = DeviceArena(context, _PIECE, writable=writable)
    arena.grow(arena.size)
    other = DeviceReservation(context, arena.size)
    other.attach([Segment(arena.segments[0].fd, 0, arena.size, 0, writable)])
    return arena, other


def read_only_copy(ordinal: int) -> str:
    arena, other = _twice(ordinal, writable=False)
    if not other.read_only:
        return "the driver does not map memory for reading only"
    driver = arena.context.driver
    stream, data = driver.stream(), ctypes.create_string_buffer(b"x" * 4096, 4096)
    try:
        driver.copy_in(other.address, ctypes.addressof(data), 4096, stream)
        driver.synchronize(stream)
    except DeviceError as error:
        return f"refused: {error.got}"
    return "it is written"


def read_only_kernel(ordinal: int) -> str:
    import torch

    _, other = _twice(ordinal, writable=False)
    if not other.read_only:
        return "the driver does not map memory for reading only"
    tensor = torch.as_tensor(_Bytes(other.address, 4096), device=f"cuda:{ordinal}")
    try:
        tensor.fill_(1)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0]}"
    return "it is written"


class _Bytes:
    """Memory of the device as torch takes it, without a copy."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


def released(ordinal: int) -> str:
    # `attach` releases each handle as soon as it is mapped.
    arena, other = _twice(ordinal, writable=True)
    driver = arena.context.driver
    stream = driver.stream()
    data, back = ctypes.create_string_buffer(b"both", 4), ctypes.create_string_buffer(4)
    driver.copy_in(other.address, ctypes.addressof(data), 4, stream)
    driver.copy_out(ctypes.addressof(back), arena.address, 4, stream)
    driver.synchronize(stream)
    return "yes" if back.raw == b"both" else f"no: {back.raw!r} came back"


def pages(ordinal: int) -> dict[str, str]:
    """What locking a full buffer takes, in small pages and in huge ones."""
    context = up(ordinal)
    found = {}
    for kind, advice in (("small", mmap.MADV_NOHUGEPAGE), ("huge", mmap.MADV_HUGEPAGE)):
        for nbytes in (8 << 20, 256 << 20):
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(advice)
            memory[:] = b"x" * nbytes
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            started = time.perf_counter()
            context.driver.register_host(address, nbytes)
            seconds = time.perf_counter() - started
            found[f"{nbytes >> 20} MiB in {kind} pages"] = f"{seconds * 1e3:.2f} ms"
            context.driver.unregister_host(address)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
