"""Whether torch takes what it needs out of addresses that are ours, also while it captures a graph.

Addresses in a graph are fixed when it is captured. They are known beforehand only where all that
torch allocates meanwhile comes from a range that we have reserved, with the workspaces of its
libraries; see `questions`.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from typing import Any

from coldframe.benchmarks.gpu.questions import up
from coldframe.loader.arena import SCRATCH_BASE, round_up
from coldframe.loader.devices.context import Context
from coldframe.loader.devices.vmm import DeviceReservation

__all__ = ["capture_in_a_pool", "pool"]

_ROOM = 256 << 20
_UNIT = 512

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


class _Range:
    """Memory at `SCRATCH_BASE` that is given out from its start to its end, and never again."""

    def __init__(self, context: Context) -> None:
        self.reservation = DeviceReservation(context, _ROOM, SCRATCH_BASE)
        memory = context.driver.create(context.ordinal, self.reservation.size, shareable=False)
        self.reservation.map(0, self.reservation.size, memory, writable=True)
        context.driver.release(memory)
        self.given = 0
        self.calls = 0
        # They must live as long as torch may call them.
        self.functions = _ALLOCATE(self._allocate), _FREE(lambda *_: None)

    def _allocate(self, nbytes: int, _: int, __: object) -> int | None:
        self.calls += 1
        at = self.given
        if at + nbytes > self.reservation.size:
            return None
        self.given = round_up(at + nbytes, _UNIT)
        return self.reservation.address + at

    def pool(self) -> Any:
        import torch

        allocate, free = (ctypes.cast(f, ctypes.c_void_p).value for f in self.functions)
        bindings: Any = torch._C
        return torch.cuda.MemPool(bindings._cuda_customAllocator(allocate, free))

    def has(self, address: int) -> bool:
        return 0 <= address - self.reservation.address < self.reservation.size


def pool(ordinal: int) -> dict[str, Any]:
    """A tensor out of it, and a linear map whose library wants a workspace."""
    import torch

    context = up(ordinal)
    device = f"cuda:{ordinal}"
    torch.cuda.set_device(ordinal)
    ones = torch.ones(64, 512, device=device, dtype=torch.bfloat16)
    room = _Range(context)
    where = f"{room.reservation.address:#x}"
    found: dict[str, Any] = {"addresses": where if room.has(SCRATCH_BASE) else f"{where}, not ours"}
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    taken: Any = room.pool()
    with torch.cuda.use_mem_pool(taken), torch.cuda.stream(side):
        some = torch.zeros(1 << 20, device=device)
        found["a tensor"] = "within" if room.has(some.data_ptr()) else f"at {some.data_ptr():#x}"
        before = room.given
        _ = torch.nn.functional.linear(ones, ones)
        torch.cuda.synchronize()
        found["bytes of a linear map and its workspace"] = room.given - before
    found["calls"] = room.calls
    return found


def capture_in_a_pool(ordinal: int) -> dict[str, Any]:
    """A step that is captured with it: which of its addresses lie elsewhere."""
    import torch

    context = up(ordinal)
    device = f"cuda:{ordinal}"
    torch.cuda.set_device(ordinal)
    room = _Range(context)
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    taken: Any = room.pool()
    with torch.cuda.use_mem_pool(taken), torch.cuda.stream(side):
        ones = torch.ones(64, 512, device=device, dtype=torch.bfloat16)
        _ = torch.nn.functional.linear(ones, ones)
    torch.cuda.synchronize()
    before = room.given
    captured = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(captured, stream=side, pool=taken.id):
        result = torch.nn.functional.linear(ones, ones) * 2
    found: dict[str, Any] = {
        "its result": "within" if room.has(result.data_ptr()) else f"at {result.data_ptr():#x}",
        "bytes that capturing took": room.given - before,
    }
    words = _words(captured.raw_cuda_graph())
    found["words that may be addresses"] = len(words)
    found["of them elsewhere"] = [f"{word:#x}" for word in words if not room.has(word)] or "none"
    captured.replay()
    torch.cuda.synchronize()
    return {**found, "replayed": bool((result == 1024).all().item())}


def _words(handle: int) -> list[int]:
    """The parameters of all kernels of a graph that could be addresses of the GPU."""
    api: Any = import_module("cuda.bindings.driver")
    captured = api.CUgraph(handle)
    _, _, count = api.cuGraphGetNodes(captured)
    _, nodes, _ = api.cuGraphGetNodes(captured, count)
    found = []
    for node in nodes:
        _, kind = api.cuGraphNodeGetType(node)
        if kind != api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
            continue
        _, node_parameters = api.cuGraphKernelNodeGetParams(node)
        number = 0
        while True:
            code, _, size = api.cuFuncGetParamInfo(node_parameters.func, number)
            if code != api.CUresult.CUDA_SUCCESS:
                break
            pointers = ctypes.cast(
                int(node_parameters.kernelParams), ctypes.POINTER(ctypes.c_void_p)
            )
            raw = ctypes.string_at(pointers[number], size)
            for at in range(0, size - 7, 8):
                word = int.from_bytes(raw[at : at + 8], "little")
                # Where the driver and we put what is on a GPU, and nothing that counts comes to.
                if 1 << 32 <= word < 1 << 48:
                    found.append(word)
            number += 1
    return found
