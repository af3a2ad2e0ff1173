"""Graphs put together again from an archive, without anything being captured.

A graph has hundreds of nodes, and there are dozens of graphs: what is done for each node is three
or four calls into C. Its parameters are made all at once; what kernels are and need is asked once
for each kernel; edges are made in one call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

from coldframe.loader.devices.graph_calls import Executable, Graph, GraphCalls, GraphNode
from coldframe.loader.devices.kernel_calls import Function
from coldframe.loader.errors import GraphRefused
from coldframe.snapshot.graph_file import GraphArchive
from coldframe.snapshot.graph_kernels import Kernels, settle
from coldframe.snapshot.graph_nodes import (
    COPY_FIELDS,
    ITSELF,
    KERNEL,
    NODE,
    OPERATION,
    WORD,
    Copy,
    Fill,
    GraphNodes,
    Region,
    relocated,
)

__all__ = ["Rebuilder"]

_PORTS = 3


class Rebuilder:
    """Puts graphs of one archive together.

    Args:
        calls: The driver's.
        archive: What they are in.
        regions: The memory that pointers lead into, where it is in this process.
        kernels: The kernels of this process.

    Raises:
        GraphRefused: The regions are not those of the archive.
    """

    def __init__(
        self,
        calls: GraphCalls,
        archive: GraphArchive,
        regions: Sequence[Region],
        kernels: Kernels,
    ) -> None:
        expected = [(region.name, region.size) for region in archive.regions]
        got = [(region.name, region.size) for region in regions]
        if expected != got:
            raise GraphRefused(
                "the memory that graphs use is not what it was",
                expected=expected,
                got=got,
                hint="Reserve the same regions, or capture again.",
            )
        self._calls = calls
        self._archive = archive
        self._kernels = kernels
        self._regions = tuple(regions)
        self._moved = [r.name for r, was in zip(regions, archive.regions, strict=True) if r != was]
        self._functions: dict[int, Function] = {}
        self._missing: dict[tuple[int, int], list[tuple[Any, bytes]]] = {}
        self._context = calls.context()

    def rebuild(self, graph: GraphNodes) -> Executable:
        """One graph, ready to be uploaded and launched; the caller's to destroy.

        Raises:
            GraphRefused: A kernel of it is not in this process, or it cannot be moved.
            DeviceError: The driver refuses.
        """
        if graph.fixed and self._moved:
            raise GraphRefused(
                "the graph may have pointers that cannot be told from other numbers",
                where=", ".join(self._moved),
                expected="the addresses at which it was captured",
                got="others",
                hint="Reserve the same addresses, or capture again.",
            )
        self._resolve(graph)
        made = self._calls.new_graph()
        try:
            self._connect(made, graph, self._nodes(made, graph))
            return self._calls.instantiate(made)
        finally:
            self._calls.destroy_graph(made)

    def _resolve(self, graph: GraphNodes) -> None:
        """Finds all kernels of a graph, before anything of it is made."""
        used = {node[1] for node in NODE.iter_unpack(graph.nodes) if node[0] == KERNEL}
        for number in used - self._functions.keys():
            identity, settings = self._archive.kernels[number]
            function = self._kernels.find(identity)
            settle(self._kernels.calls, function, settings)
            self._functions[number] = function

    def _nodes(self, made: Graph, graph: GraphNodes) -> list[GraphNode]:
        block = bytearray(len(graph.words))
        held = (ctypes.c_char * len(block)).from_buffer(block)
        address = ctypes.addressof(held)
        bases = {number + 1: region.base for number, region in enumerate(self._regions)}
        block[:] = relocated(graph.words, graph.kinds, {**bases, ITSELF: address})

        params = self._calls.api.CUDA_KERNEL_NODE_PARAMS()
        add, functions = self._calls.add_kernel, self._functions
        nodes: list[GraphNode] = []
        for node in NODE.iter_unpack(graph.nodes):
            kind, number = node[0], node[1]
            if kind == KERNEL:
                params.func = functions[number]
                params.gridDimX, params.gridDimY, params.gridDimZ = node[2:5]
                params.blockDimX, params.blockDimY, params.blockDimZ = node[5:8]
                params.sharedMemBytes = node[8]
                params.kernelParams = address + node[10] * WORD
                nodes.append(add(made, params))
                for attribute, value in self._attributes(nodes[-1], number, node[9]):
                    self._calls.set_node_attribute(nodes[-1], attribute, value)
            elif kind == OPERATION:
                nodes.append(self._operation(made, graph.operations[number]))
            else:
                nodes.append(self._calls.add_empty(made))
        return nodes

    def _attributes(self, node: GraphNode, kernel: int, number: int) -> list[tuple[Any, bytes]]:
        """The attributes that a fresh node of a kernel has to be given; asked of the first."""
        missing = self._missing.get((kernel, number))
        if missing is None:
            missing = []
            for name, value in self._archive.attributes[number]:
                kind = getattr(
                    self._calls.api.CUkernelNodeAttrID, f"CU_LAUNCH_ATTRIBUTE_{name}", None
                )
                now = None if kind is None else self._calls.node_attribute(node, kind)
                if now is None:
                    raise GraphRefused(
                        "a kernel's node has an attribute that this driver does not know",
                        where=name,
                        hint="Update the driver and cuda-bindings, or capture again.",
                    )
                if now != value:
                    missing.append((kind, value))
            self._missing[kernel, number] = missing
        return missing

    def _operation(self, made: Graph, operation: Fill | Copy) -> GraphNode:
        api = self._calls.api
        if isinstance(operation, Fill):
            fill = api.CUDA_MEMSET_NODE_PARAMS()
            fill.dst = api.CUdeviceptr(self._address(operation.target))
            fill.pitch, fill.value = operation.pitch, operation.value
            fill.elementSize = operation.element
            fill.width, fill.height = operation.width, operation.height
            return self._calls.add_memset(made, fill, self._context)
        copy = api.CUDA_MEMCPY3D()
        for name, value in zip(COPY_FIELDS, operation.numbers, strict=True):
            setattr(copy, name, value)
        device = api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcMemoryType = copy.dstMemoryType = device
        copy.srcDevice = api.CUdeviceptr(self._address(operation.source))
        copy.dstDevice = api.CUdeviceptr(self._address(operation.target))
        return self._calls.add_memcpy(made, copy, self._context)

    def _address(self, place: tuple[int, int]) -> int:
        return self._regions[place[0]].base + place[1]

    def _connect(self, made: Graph, graph: GraphNodes, nodes: Sequence[GraphNode]) -> None:
        if not graph.sources:
            return
        data = None
        if graph.ports:
            kinds: dict[bytes, Any] = {}
            data = [
                kinds.get(key) or kinds.setdefault(key, self._edge(key))
                for key in _chunks(graph.ports)
            ]
        sources, targets = _picked(nodes, graph.sources), _picked(nodes, graph.targets)
        self._calls.add_edges(made, sources, targets, data)

    def _edge(self, ports: bytes) -> Any:
        edge = self._calls.api.CUgraphEdgeData()
        edge.from_port, edge.to_port, edge.type = ports
        return edge


def _chunks(ports: bytes) -> Iterable[bytes]:
    return (ports[at : at + _PORTS] for at in range(0, len(ports), _PORTS))


def _picked(nodes: Sequence[GraphNode], numbers: Sequence[int]) -> Sequence[GraphNode]:
    return itemgetter(*numbers)(nodes) if len(numbers) > 1 else [nodes[numbers[0]]]
