"""`coldframe bench graphs`: what Python does for each node of a captured graph, saved and rebuilt.

No GPU is asked for: the calls of this driver cost nothing, and do nothing. So the figures are the
part of a save and of a rebuild that is ours, and a lower bound of either; what the driver itself
takes for a node comes on top, and only a GPU can tell.

The graphs are of the shape of a decode step's: for each layer some kernels with pointers and
numbers, one behind the other.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import time
from typing import Any

from coldframe.benchmarks.harness import Row, print_rows
from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.graph_calls import GraphCalls
from coldframe.loader.errors import PlatformError
from coldframe.loader.packages import add_site_packages
from coldframe.runtime.flags.parser import Parser
from coldframe.snapshot.graph_file import decode, encode
from coldframe.snapshot.graphs import GraphFingerprint, Kernels, Region, rebuild, save

__all__ = ["add_arguments", "run"]

_REGIONS = (
    Region("weights", 0x2000_0000_0000, 1 << 44),
    Region("kv", 0x3000_0000_0000, 1 << 44),
    Region("scratch", 0x4000_0000_0000, 1 << 44),
)
_MOVED = tuple(region._replace(base=region.base + (1 << 21)) for region in _REGIONS)
_HERE = GraphFingerprint("", "", "", "", "", "", "", "", tuple((r.name, r.size) for r in _REGIONS))
_LAYOUT = (*((8 * number, 8) for number in range(6)), *((48 + 4 * n, 4) for n in range(12)))
_KERNELS = 40
_LAYER = 10


def add_arguments(parser: Parser) -> None:
    parser.flag("--runs", type=int, default=5, help="how often each is measured (5)")
    parser.flag("--graphs", type=int, default=32, help="captured steps in the archive (32)")
    parser.flag("--layers", type=int, default=32, help="of the model (32)")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark and prints its table.

    Raises:
        PlatformError: The bindings to the driver are not installed.
    """
    add_site_packages()
    try:
        bindings = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise PlatformError(
            "the bindings to the CUDA driver are not installed",
            expected="the package cuda-bindings",
            got=error,
            hint="Install coldframe[cuda]; no GPU is needed.",
        ) from error
    nodes = args.layers * _LAYER
    count = nodes * args.graphs
    found: dict[str, list[float]] = {}

    def timed(name: str, began: float, per: int) -> None:
        found.setdefault(name, []).append((time.perf_counter() - began) / per * 1e6)

    for _ in range(args.runs):
        driver = Driver(_Idle(bindings, nodes))
        graphs: dict[str, Any] = {str(number): number for number in range(1, args.graphs + 1)}
        began = time.perf_counter()
        archive = save(driver, graphs, _REGIONS, _HERE)
        timed("save, a node", began, count)
        began = time.perf_counter()
        raw = encode(archive)
        timed("encode, a node", began, count)
        began = time.perf_counter()
        archive = decode(raw, "memory", _HERE)
        timed("decode, a node", began, count)
        for name, regions in (("", _REGIONS), (", regions elsewhere", _MOVED)):
            began = time.perf_counter()
            kernels = Kernels(GraphCalls(driver))
            kernels.learn(graphs["1"])
            timed(f"find {_KERNELS} kernels{name}", began, 1)
            began = time.perf_counter()
            rebuilt = rebuild(driver, archive, regions, kernels)
            timed(f"rebuild, a node{name}", began, count)
            assert len(rebuilt.graphs) == args.graphs
            rebuilt.close()
    rows = [Row(name, runs, "us") for name, runs in found.items()]
    facts = {"graphs": args.graphs, "nodes": nodes, "archive_bytes": len(raw), "driver": "none"}
    print_rows(rows, facts)
    return 0


class _Idle:
    """A driver that does nothing, and has graphs of so many nodes.

    Args:
        bindings: Whose types it takes and gives.
        nodes: Of each graph.
    """

    def __init__(self, bindings: Any, nodes: int) -> None:
        self._real = bindings
        self._done = bindings.CUresult.CUDA_SUCCESS
        self._no = bindings.CUresult.CUDA_ERROR_INVALID_VALUE
        self._nodes = [bindings.CUgraphNode(number + 1) for number in range(nodes)]
        self._held: list[Any] = []
        self._params = [self._kernel(number) for number in range(_KERNELS)]
        self._numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        # Types and enumerations; and calls, of which only some have anything to say.
        found = getattr(self._real, name)
        return found if name.startswith("CU") else self._succeed

    def _succeed(self, *arguments: Any) -> tuple[Any, ...]:
        return (self._done,)

    def _kernel(self, number: int) -> Any:
        """A node's parameters: pointers into all regions, and numbers."""
        block = (ctypes.c_uint64 * 12)()
        for place in range(6):
            block[place] = _REGIONS[place % 3].base + 4096 * (number + place)
        for place in range(6, 12):
            block[place] = number << 32 | place
        at = ctypes.addressof(block)
        table = (ctypes.c_uint64 * len(_LAYOUT))(*(at + offset for offset, _ in _LAYOUT))
        params = self._real.CUDA_KERNEL_NODE_PARAMS()
        params.func = self._real.CUfunction(number + 1)
        params.gridDimX = params.gridDimY = params.gridDimZ = 1
        params.blockDimX, params.blockDimY, params.blockDimZ = 128, 1, 1
        params.kernelParams = ctypes.addressof(table)
        self._held += [block, table]
        return params

    def cuGetProcAddress(self, *arguments: Any) -> tuple[Any, int, Any]:
        found = self._real.CUdriverProcAddressQueryResult.CU_GET_PROC_ADDRESS_SUCCESS
        return self._done, 1, found

    def cuDriverGetVersion(self) -> tuple[Any, int]:
        return self._done, 13000

    def cuGraphGetNodes(self, graph: Any, count: int) -> tuple[Any, list[Any], int]:
        return self._done, self._nodes[:count], len(self._nodes)

    def cuGraphGetEdges(self, graph: Any, count: int) -> tuple[Any, ...]:
        edges = len(self._nodes) - 1
        data = [self._real.CUgraphEdgeData()] * edges if count else []
        return self._done, self._nodes[:count], self._nodes[1 : count + 1], data, edges

    def cuGraphNodeGetType(self, node: Any) -> tuple[Any, Any]:
        return self._done, self._real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL

    def cuGraphKernelNodeGetParams(self, node: Any) -> tuple[Any, Any]:
        return self._done, self._params[int(node) % _KERNELS]

    def cuGraphKernelNodeGetAttribute(self, node: Any, attribute: Any) -> tuple[Any, Any]:
        return self._done, self._real.CUkernelNodeAttrValue()

    def cuPointerGetAttribute(self, attribute: Any, address: int) -> tuple[Any, None]:
        return self._no, None

    def cuFuncGetName(self, function: Any) -> tuple[Any, bytes]:
        return self._done, b"_ZN2at6native29vectorized_elementwise_kernel%d" % int(function)

    def cuFuncGetParamInfo(self, function: Any, number: int) -> tuple[Any, ...]:
        return (self._done, *_LAYOUT[number]) if number < len(_LAYOUT) else (self._no, None, None)

    def cuFuncGetAttribute(self, attribute: Any, function: Any) -> tuple[Any, int]:
        return self._done, 1

    def cuFuncGetModule(self, function: Any) -> tuple[Any, Any]:
        return self._done, self._real.CUmodule(1)

    def cuModuleGetFunctionCount(self, module: Any) -> tuple[Any, int]:
        return self._done, _KERNELS

    def cuCtxGetCurrent(self) -> tuple[Any, Any]:
        return self._done, self._real.CUcontext(1)

    def cuStreamCreate(self, flags: Any) -> tuple[Any, Any]:
        return self._done, self._real.CUstream(1)

    def cuGraphCreate(self, flags: int) -> tuple[Any, Any]:
        return self._done, self._real.CUgraph(1)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        return self._done, self._real.CUgraphExec(next(self._numbers))

    def cuGraphAddKernelNode(self, *arguments: Any) -> tuple[Any, Any]:
        return self._done, self._real.CUgraphNode(next(self._numbers))
