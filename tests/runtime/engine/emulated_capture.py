"""A capturer for an emulated GPU: each call of ATen becomes a kernel of the driver's graph.

As libraries' kernels on a GPU, these are there for whoever knows their names: a kernel is called as
the operator is, and all else of a call - shapes, strides, numbers - is in its parameters, beside
the pointers. What a call computes in lies in the worker's own memory. So such a graph can be saved
in one process and put together in the next, where nothing of the first is left.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cuda.bindings import driver as real
from torch import Tensor

from coldframe.loader.devices.cuda import CudaDevice
from coldframe.loader.devices.graph_calls import Executable, GraphCalls
from coldframe.runtime.worker.tensors import tensor_over
from tests.loader.devices.emulated_graphs import KernelCode, Launch
from tests.runtime.engine.recording import _Call, _storage, _Writing

_POINTERS = 24
_TEXT = 3904
LAYOUT = (*((8 * number, 8) for number in range(_POINTERS)), (8 * _POINTERS, _TEXT))
_HOST = (1, 0)

Replayed = Callable[[], object]


class EmulatedCapturer:
    """See the module.

    Args:
        gpu: The device.
        replayed: Called before each replay of what was captured here.
    """

    note = ""

    def __init__(self, gpu: CudaDevice, replayed: Replayed = lambda: None) -> None:
        self._calls = GraphCalls(gpu.context.driver)
        self._scratch = gpu.scratch()
        self._replayed = replayed
        gpu.context.bind()

    @property
    def scratch(self) -> tuple[int, int] | None:
        return self._scratch.address, self._scratch.used

    @property
    def own_bytes(self) -> int:
        return self._scratch.grown

    def place(self, nbytes: int) -> Tensor:
        address = self._scratch.take(nbytes)
        self._scratch.fix()
        return tensor_over(address, nbytes, _HOST).fill_(0x7F)

    def reach(self, nbytes: int) -> None:
        self._scratch.reach(nbytes)

    def capture(self, work: Callable[[], object]) -> _Graph:
        calls: list[_Call] = []
        writing = _Writing(calls)
        with writing:
            work()
        graph, moved = self._calls.new_graph(), {}
        for tensor in writing._own.values():
            moved[_storage(tensor)] = self._scratch.take(tensor.untyped_storage().nbytes())
        before: Any = None
        for call in calls:
            node = self._add(graph, call, moved)
            if before is not None:
                self._calls.add_edges(graph, [before], [node])
            before = node
        return _Graph(self._calls, graph, self._replayed)

    def drop(self) -> None:
        raise NotImplementedError

    def _add(self, graph: Any, call: _Call, moved: dict[int, int]) -> Any:
        """The node of a call, all that was made in the capture being where it is `moved` to."""
        pointers: list[int] = []

        def packed(value: Any) -> Any:
            if isinstance(value, Tensor):
                storage = _storage(value)
                pointers.append(moved.get(storage, storage) + value.data_ptr() - storage)
                return {
                    "at": len(pointers) - 1,
                    "shape": list(value.shape),
                    "stride": list(value.stride()),
                    "dtype": str(value.dtype),
                }
            if isinstance(value, list | tuple):
                return [packed(item) for item in value]
            if isinstance(value, torch.device):
                return {"device": str(value)}
            if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
                return {"torch": str(value).removeprefix("torch.")}
            assert value is None or isinstance(value, bool | int | float | str)
            return value

        text = json.dumps(
            {
                "args": packed(call.args),
                "kwargs": {name: packed(value) for name, value in call.kwargs.items()},
                "outputs": packed(call.outputs),
                "onednn": call.onednn,
            }
        )
        # Spaces to the end: no word of a text is an address.
        raw = text.encode().ljust(_TEXT)
        assert len(raw) == _TEXT
        held = (ctypes.c_uint64 * _POINTERS)(*pointers)
        code = ctypes.create_string_buffer(raw, _TEXT)
        at = ctypes.addressof(held)
        places = [*range(at, at + 8 * _POINTERS, 8), ctypes.addressof(code)]
        table = (ctypes.c_uint64 * len(places))(*places)
        params = real.CUDA_KERNEL_NODE_PARAMS()
        params.func = self._function(str(call.operator))
        params.gridDimX = params.gridDimY = params.gridDimZ = 1
        params.blockDimX = params.blockDimY = params.blockDimZ = 1
        params.kernelParams = ctypes.addressof(table)
        return self._calls.add_kernel(graph, params)

    def _function(self, name: str) -> Any:
        emulator = self._calls.api
        known = emulator.__dict__.setdefault("aten", {})
        if name not in known:
            code = KernelCode(name, partial(compute, name), LAYOUT)
            (known[name],) = emulator.load_module([code], into=next(iter(known.values()), None))
        return known[name]


class _Graph:
    def __init__(self, calls: GraphCalls, graph: Any, replayed: Replayed) -> None:
        self._calls = calls
        self._graph = graph
        self._executable = calls.instantiate(graph)
        self._replayed = replayed

    @property
    def handle(self) -> int:
        return int(self._graph)

    def replay(self) -> None:
        self._replayed()
        launch(self._calls, self._executable)

    def close(self) -> None:
        self._calls.destroy(self._executable)
        self._calls.destroy_graph(self._graph)


def launch(calls: GraphCalls, executable: Executable) -> None:
    """Runs a graph, and waits: what torch does next it does at once, on the host."""
    stream = calls.driver.stream()
    calls.launch(executable, stream)
    calls.driver.synchronize(stream)
    calls.driver.destroy_stream(stream)


@torch.inference_mode()
def compute(name: str, launch: Launch) -> None:
    """Makes the call that a kernel's name and parameters tell of."""
    *pointers, text = launch.arguments
    addresses = [int.from_bytes(pointer, "little") for pointer in pointers]
    call = json.loads(text)
    operator: Any = torch.ops
    for part in name.split("."):
        operator = getattr(operator, part)
    args = _unpacked(call["args"], addresses)
    kwargs = {key: _unpacked(value, addresses) for key, value in call["kwargs"].items()}
    outputs = _unpacked(call["outputs"], addresses)
    _Call(operator, tuple(args), kwargs, outputs, call["onednn"])()


def _unpacked(value: Any, addresses: list[int]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, addresses) for item in value]
    if not isinstance(value, dict):
        return value
    if "device" in value:
        return torch.device(value["device"])
    if "torch" in value:
        return getattr(torch, value["torch"])
    dtype = getattr(torch, value["dtype"].removeprefix("torch."))
    shape, stride = value["shape"], value["stride"]
    span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    nbytes = span * dtype.itemsize if all(shape) else 0
    whole = tensor_over(addresses[value["at"]], nbytes, _HOST)
    return whole.view(dtype).as_strided(shape, stride)
