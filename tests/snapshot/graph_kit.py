"""Captured graphs for the tests: a device with regions, kernels that count, and ways to capture."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from cuda.bindings import driver as real

from coldframe.loader.devices.context import Context
from coldframe.loader.devices.driver import Driver, Memory
from coldframe.loader.devices.graph_calls import GraphCalls
from coldframe.snapshot.graphs import GraphFingerprint, Region
from tests.loader.devices.emulated_graphs import KernelCode, Launch
from tests.loader.devices.emulator import GRANULARITY, Emulator

BASES = {"weights": 0x2100_0000_0000, "kv": 0x3100_0000_0000, "scratch": 0x4100_0000_0000}
MOVED = {"weights": 0x5100_0000_0000, "kv": 0x3500_0000_0000, "scratch": 0x6100_0000_0000}
SIZE = GRANULARITY


def _mix(launch: Launch) -> None:
    """target[i] = target[i] * 3 + source[i] + add, over bytes."""
    target, source, add, count = launch.numbers
    left, right = launch.read(target, count), launch.read(source, count)
    both = zip(left, right, strict=True)
    launch.write(target, bytes((a * 3 + b + add) % 256 for a, b in both))


def _index(launch: Launch) -> None:
    """Writes its blocks and threads, and a number out of a structure that also has a pointer."""
    (structure,) = launch.arguments
    target, number = (int.from_bytes(structure[at : at + 8], "little") for at in (0, 8))
    values = (*launch.grid, *launch.block, number % 251)
    launch.write(target, bytes(value % 256 for value in values))


def _nothing(launch: Launch) -> None:
    launch.read(0, 0)


MIX = KernelCode("_Z3mixPhPKhii", _mix, ((0, 8), (8, 8), (16, 4), (20, 4)), {"NUM_REGS": 24})
INDEX = KernelCode("_Z5index6Place_", _index, ((0, 24),))
TWIN = KernelCode("_Z4twinPhPKhii", _mix, MIX.layout, {"SHARED_SIZE_BYTES": 1024})
BARE = KernelCode("_Z4barev", lambda launch: None, ())
KERNELS = (MIX, INDEX, TWIN, BARE)


class Device:
    """An emulated GPU of this process with regions of memory, each with a page behind it.

    Args:
        bases: Where the regions are to be.
        emulator: The GPU; a new one where there is none.
    """

    def __init__(self, bases: dict[str, int] = BASES, emulator: Emulator | None = None) -> None:
        self.emulator = emulator or Emulator()
        self.driver = Driver.open(self.emulator)
        self.context = Context(self.driver, 0)
        self.context.bind()
        self.calls = GraphCalls(self.driver)
        self.regions = tuple(Region(name, base, SIZE) for name, base in bases.items())
        self._memory: list[tuple[int, Memory]] = []
        for region in self.regions:
            self.map(region.base)
        self.functions = dict(
            zip((code.name for code in KERNELS), self.emulator.load_module(KERNELS), strict=True)
        )
        self._graphs: list[Any] = []

    def map(self, address: int) -> int:
        """Memory at an address, or where there is room."""
        memory = self.driver.create(0, SIZE)
        got = self.driver.reserve(SIZE, GRANULARITY, address)
        assert not address or got == address
        self.driver.map(got, SIZE, memory)
        self.driver.set_access(got, SIZE, 0, writable=True)
        ctypes.memset(got, 0, SIZE)
        self._memory.append((got, memory))
        return got

    def base(self, name: str) -> int:
        return next(region.base for region in self.regions if region.name == name)

    def fill(self, seed: int) -> None:
        """Puts something into all regions."""
        for number, region in enumerate(self.regions):
            data = bytes((seed * 31 + number * 7 + i * i) % 256 for i in range(4096))
            ctypes.memmove(region.base, data, len(data))

    def content(self) -> bytes:
        """What is in all regions."""
        return b"".join(ctypes.string_at(region.base, 4096) for region in self.regions)

    def graph(self) -> Any:
        """A new graph, which `close` ends."""
        graph = self.calls.new_graph()
        self._graphs.append(graph)
        return graph

    def launch(self, graph: Any) -> None:
        """Runs a graph as it is, and waits for it."""
        executable = self.calls.instantiate(graph)
        try:
            self.run(executable)
        finally:
            self.calls.destroy(executable)

    def run(self, executable: Any) -> None:
        """Launches an executable graph, and waits for it."""
        stream = self.driver.stream()
        try:
            self.calls.launch(executable, stream)
            self.driver.synchronize(stream)
        finally:
            self.driver.destroy_stream(stream)

    def kernel(
        self,
        graph: Any,
        code: KernelCode,
        values: Sequence[int | bytes],
        *,
        grid: tuple[int, int, int] = (1, 1, 1),
        block: tuple[int, int, int] = (32, 1, 1),
        shared: int = 0,
        function: Any = None,
        before: Sequence[Any] = (),
    ) -> Any:
        """Adds a kernel's node, behind some others."""
        params = real.CUDA_KERNEL_NODE_PARAMS()
        given = self.functions[code.name] if function is None else function
        if isinstance(given, real.CUkernel):
            params.kern = given
        else:
            params.func = given
        params.gridDimX, params.gridDimY, params.gridDimZ = grid
        params.blockDimX, params.blockDimY, params.blockDimZ = block
        params.sharedMemBytes = shared
        held = [
            ctypes.create_string_buffer(
                value if isinstance(value, bytes) else value.to_bytes(size, "little"), size
            )
            for value, (_, size) in zip(values, code.layout, strict=True)
        ]
        table = (ctypes.c_uint64 * max(1, len(held)))(*map(ctypes.addressof, held))
        if held:
            params.kernelParams = ctypes.addressof(table)
        node = self.calls.add_kernel(graph, params)
        self.edges(graph, [(other, node) for other in before])
        return node

    def edges(self, graph: Any, pairs: Sequence[tuple[Any, Any]]) -> None:
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self.calls.add_edges(graph, sources, targets)

    def fingerprint(self, **changes: Any) -> GraphFingerprint:
        """This process's, or one that differs in something."""
        versions = {"torch": "2.11.0", "cuda": "13.0", "model": "f00d"}
        here = GraphFingerprint.here(self.calls, 0, self.regions, **versions)
        return here._replace(**changes)

    def close(self) -> None:
        for graph in self._graphs:
            self.calls.destroy_graph(graph)
        self._graphs.clear()
        for address, memory in self._memory:
            self.driver.unmap(address, SIZE)
            self.driver.release(memory)
            self.driver.free_addresses(address, SIZE)
        self._memory.clear()
        self.context.close()


def structure(pointer: int, number: int) -> bytes:
    """The parameter of `INDEX`."""
    return b"".join(value.to_bytes(8, "little") for value in (pointer, number, 7))


def capture(device: Device) -> Any:
    """A graph with everything that can be kept.

    Two copies, a memset, kernels with and without pointers in structures, a diamond, an empty node.
    """
    graph, calls = device.graph(), device.calls
    weights, kv, scratch = (device.base(name) for name in ("weights", "kv", "scratch"))
    context = calls.context()
    first = device.kernel(graph, MIX, (kv, weights + 64, 5, 128))
    left = device.kernel(graph, MIX, (scratch, kv, 1, 128), before=[first], grid=(2, 1, 1))
    right = device.kernel(graph, TWIN, (scratch + 256, kv, 2, 100), before=[first])
    fill = real.CUDA_MEMSET_NODE_PARAMS()
    fill.dst, fill.pitch, fill.value = real.CUdeviceptr(scratch + 512), 32, 0xABCD
    fill.elementSize, fill.width, fill.height = 2, 8, 3
    filled = calls.add_memset(graph, fill, context)
    copy = real.CUDA_MEMCPY3D()
    copy.srcMemoryType = real.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.dstMemoryType = real.CUmemorytype.CU_MEMORYTYPE_UNIFIED
    copy.srcDevice = real.CUdeviceptr(scratch)
    copy.dstDevice = real.CUdeviceptr(kv + 1024)
    copy.srcPitch, copy.dstPitch = 64, 128
    copy.WidthInBytes, copy.Height, copy.Depth = 48, 4, 1
    copied = calls.add_memcpy(graph, copy, context)
    joint = calls.add_empty(graph)
    last = device.kernel(
        graph,
        INDEX,
        (structure(scratch + 2048, 0x77),),
        grid=(3, 4, 5),
        block=(8, 2, 1),
        shared=2048,
    )
    bare = device.kernel(graph, BARE, ())
    device.edges(
        graph,
        [
            (left, copied),
            (right, joint),
            (left, joint),
            (filled, joint),
            (copied, joint),
            (joint, last),
            (first, bare),
        ],
    )
    return graph


def one_of_each(device: Device) -> Any:
    """What a new process captures on its own: one kernel of the module, never launched."""
    graph = device.graph()
    device.kernel(graph, BARE, ())
    return graph


Build = Callable[[Device], Any]
