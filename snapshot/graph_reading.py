"""Captured graphs read node by node, and refused where a node means nothing in another process.

Kept are kernels, memsets, copies within the device and empty nodes, if all that they point to is in
a region.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from coldframe.loader.devices.graph_calls import Graph, GraphCalls, GraphNode
from coldframe.loader.devices.kernel_calls import Function, KernelCalls
from coldframe.loader.errors import DeviceError, DeviceLost
from coldframe.snapshot.graph_kernels import (
    KernelIdentity,
    function_of,
    identify,
    settings_of,
)
from coldframe.snapshot.graph_nodes import (
    COPY_FIELDS,
    EMPTY,
    KERNEL,
    NODE,
    OPERATION,
    Copy,
    Fill,
    GraphNodes,
    Region,
)
from coldframe.snapshot.graph_pointers import ParameterBlock, Pointers, refused

__all__ = ["Attributes", "GraphReader", "Settings"]

Settings = tuple[tuple[str, int], ...]
Attributes = tuple[tuple[str, bytes], ...]
"""By the driver's names, the attributes of a node and their bytes."""

NODE_ATTRIBUTES = (
    "ACCESS_POLICY_WINDOW",
    "COOPERATIVE",
    "CLUSTER_DIMENSION",
    "CLUSTER_SCHEDULING_POLICY_PREFERENCE",
    "PRIORITY",
    "MEM_SYNC_DOMAIN_MAP",
    "MEM_SYNC_DOMAIN",
    "PREFERRED_CLUSTER_DIMENSION",
    "DEVICE_UPDATABLE_KERNEL_NODE",
    "PREFERRED_SHARED_MEMORY_CARVEOUT",
    "NVLINK_UTIL_CENTRIC_SCHEDULING",
    "PORTABLE_CLUSTER_SIZE_MODE",
    "SHARED_MEMORY_MODE",
)
"""Those that kernels' nodes have, or a newer driver's may. What was said of programmatic launches
when a kernel was captured is in the edges' data."""

_ZEROS = bytes(64)
"""What an attribute is that nobody has set."""

_POINTS = ("ACCESS_POLICY_WINDOW", "DEVICE_UPDATABLE_KERNEL_NODE")
"""Attributes that hold an address or a handle."""

_OTHER_KINDS = {
    "HOST": "calls a function of this process",
    "GRAPH": "is a graph of its own",
    "WAIT_EVENT": "waits for an event of this process",
    "EVENT_RECORD": "records an event of this process",
    "EXT_SEMAS_SIGNAL": "signals a semaphore from outside",
    "EXT_SEMAS_WAIT": "waits for a semaphore from outside",
    "MEM_ALLOC": "allocates memory",
    "MEM_FREE": "frees memory",
    "BATCH_MEM_OP": "reads or writes memory on the stream's behalf",
    "CONDITIONAL": "decides on its own whether to go on",
}


class _Parts:
    """A graph while it is read."""

    def __init__(self) -> None:
        self.nodes: list[bytes] = []
        self.operations: list[Fill | Copy] = []
        self.block = ParameterBlock()


class GraphReader:
    """Reads graphs of one process, and what they have in common once.

    Args:
        calls: The driver's calls.
        regions: What pointers may lead into; they do not overlap.

    Attributes:
        kernels: What each kernel is known by, and what was set of it, in the order of first use.
        attributes: The different attributes that nodes have.
    """

    def __init__(self, calls: GraphCalls, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)
        self.kernels: list[tuple[KernelIdentity, Settings]] = []
        self.attributes: list[Attributes] = []
        self._calls = calls
        self._kernels = KernelCalls(calls.driver)
        self._numbers: dict[int, int] = {}
        self._known: dict[KernelIdentity, int] = {}
        self._attribute_numbers: dict[Attributes, int] = {}
        self._pointers = Pointers(calls, regions)
        kinds, names = calls.api.CUkernelNodeAttrID, NODE_ATTRIBUTES
        known = {name: getattr(kinds, f"CU_LAUNCH_ATTRIBUTE_{name}", None) for name in names}
        self._kinds = {name: kind for name, kind in known.items() if kind is not None}

    def read(self, graph: Graph) -> GraphNodes:
        """One graph.

        Raises:
            GraphRefused: It has something that cannot be kept.
            DeviceError: The driver refuses to say what it has.
        """
        nodes = self._calls.nodes(graph)
        numbers = {_number(node): position for position, node in enumerate(nodes)}
        edges = sorted(
            (numbers[source], numbers[target], bytes(data))
            for source, target, data in self._calls.edges(graph)
        )
        ports = b"".join(data for _, _, data in edges)
        parts = _Parts()
        for node in nodes:
            kind = self._calls.kind(node)
            if kind == "KERNEL":
                self._kernel(node, parts)
            elif kind in ("MEMSET", "MEMCPY"):
                parts.nodes.append(NODE.pack(OPERATION, len(parts.operations), *[0] * 9))
                parts.operations.append(self._fill(node) if kind == "MEMSET" else self._copy(node))
            elif kind == "EMPTY":
                parts.nodes.append(NODE.pack(EMPTY, *[0] * 10))
            else:
                why = _OTHER_KINDS.get(kind, "is of a kind that nobody here knows")
                raise refused(f"a node {why}", f"a {kind} node", got=kind)
        return GraphNodes(
            b"".join(parts.nodes),
            array("I", [source for source, _, _ in edges]),
            array("I", [target for _, target, _ in edges]),
            ports if any(ports) else b"",
            tuple(parts.operations),
            parts.block.words(),
            bytes(parts.block.kinds),
            parts.block.fixed,
        )

    # -- kernels ---------------------------------------------------------------------------------

    def _kernel(self, node: GraphNode, parts: _Parts) -> None:
        params = self._calls.kernel_params(node)
        number = self._kernel_number(params)
        kernel = self.kernels[number][0]
        attributes = self._node_attributes(node, kernel)
        grid = (int(getattr(params, f"gridDim{axis}")) for axis in "XYZ")
        block = (int(getattr(params, f"blockDim{axis}")) for axis in "XYZ")
        shared = int(params.sharedMemBytes)
        table = parts.block.add(kernel, params, self._pointers)
        parts.nodes.append(NODE.pack(KERNEL, number, *grid, *block, shared, attributes, table))

    def _kernel_number(self, params: Any) -> int:
        handle = int(params.func) or int(params.kern)
        number = self._numbers.get(handle)
        if number is None:
            kernel, settings = self._identity(params)
            number = self._known.setdefault(kernel, len(self.kernels))
            if number == len(self.kernels):
                self.kernels.append((kernel, settings))
            else:  # the same kernel in two modules; each may have been given more
                most = {**dict(self.kernels[number][1])}
                most.update((name, max(value, most.get(name, value))) for name, value in settings)
                self.kernels[number] = (kernel, tuple(most.items()))
            self._numbers[handle] = number
        return number

    def _identity(self, params: Any) -> tuple[KernelIdentity, Settings]:
        try:
            function: Function | None = function_of(self._kernels, params)
            name = None if function is None else self._kernels.name(function)
            if function is not None and name:
                settings = settings_of(self._kernels, function)
                return identify(self._kernels, function, name), settings
        except DeviceLost:
            raise
        except DeviceError as error:
            raise refused(
                "the driver does not say what a kernel is",
                "a KERNEL node",
                got=error,
                hint="Update the driver; until then the graph is captured in each process.",
            ) from error
        raise refused(
            "a kernel has no name",
            "a KERNEL node",
            expected="a function of a module or library",
            got="a handle that the driver has no name for",
        )

    def _node_attributes(self, node: GraphNode, kernel: KernelIdentity) -> int:
        found = []
        for name, kind in self._kinds.items():
            value = self._calls.node_attribute(node, kind)
            if value is None or value == _ZEROS:
                continue
            if name in _POINTS:
                raise refused(
                    "a kernel's node holds an address or a handle in an attribute",
                    f"a KERNEL node, kernel {kernel.name}",
                    got=name,
                )
            found.append((name, value))
        attributes = tuple(found)
        number = self._attribute_numbers.setdefault(attributes, len(self.attributes))
        if number == len(self.attributes):
            self.attributes.append(attributes)
        return number

    # -- memsets and copies ----------------------------------------------------------------------

    def _fill(self, node: GraphNode) -> Fill:
        params = self._calls.memset_params(node)
        target = self._pointers.demand(int(params.dst), "a MEMSET node")
        fields = ("pitch", "value", "elementSize", "width", "height")
        return Fill(target, *(int(getattr(params, name)) for name in fields))

    def _copy(self, node: GraphNode) -> Copy:
        params, kinds = self._calls.memcpy_params(node), self._calls.api.CUmemorytype
        ends = []
        for end, what in (("src", "from"), ("dst", "to")):
            kind = getattr(params, f"{end}MemoryType")
            if kind not in (kinds.CU_MEMORYTYPE_DEVICE, kinds.CU_MEMORYTYPE_UNIFIED):
                name = str(kind.name).removeprefix("CU_MEMORYTYPE_").lower()
                raise refused(
                    f"a copy is {what} memory that is not the device's",
                    "a MEMCPY node",
                    expected="device",
                    got=name,
                    hint="Leave copies from and to the host out of what is captured.",
                )
            address = int(getattr(params, f"{end}Device"))
            ends.append(self._pointers.demand(address, f"a MEMCPY node, {what}"))
        return Copy(ends[0], ends[1], tuple(int(getattr(params, name)) for name in COPY_FIELDS))


def _number(node: Any) -> int:
    return int(node)
