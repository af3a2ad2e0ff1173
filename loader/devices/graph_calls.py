"""The CUDA driver's graphs: how one is read, put together and run.

As in `driver.py` names are ours, the order of arguments is the driver's, and an error of ours comes
for each of its. Kernels are in `kernel_calls.py`; which graphs can be kept is said in
`snapshot/graphs.py`.

All of it needs a context that is current in the calling thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NewType

from coldframe.loader.devices.driver import Driver, Stream
from coldframe.loader.devices.kernel_calls import NAMING
from coldframe.loader.errors import DeviceError

__all__ = [
    "GraphCalls",
    "Graph",
    "GraphNode",
    "Executable",
    "READING",
    "REBUILDING",
]

Graph = NewType("Graph", object)
"""What was captured, or is being put together."""
GraphNode = NewType("GraphNode", object)
Executable = NewType("Executable", object)
"""A graph that can be launched."""

READING = (
    *NAMING,
    "cuGraphGetEdges",
    "cuGraphGetNodes",
    "cuGraphKernelNodeGetAttribute",
    "cuGraphKernelNodeGetParams",
    "cuGraphMemcpyNodeGetParams",
    "cuGraphMemsetNodeGetParams",
    "cuGraphNodeGetType",
    "cuPointerGetAttribute",
)
"""Calls without which a graph cannot be read."""

REBUILDING = (
    *READING,
    "cuCtxGetCurrent",
    "cuGraphAddDependencies",
    "cuGraphAddEmptyNode",
    "cuGraphAddKernelNode",
    "cuGraphAddMemcpyNode",
    "cuGraphAddMemsetNode",
    "cuGraphCreate",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiate",
    "cuGraphKernelNodeSetAttribute",
    "cuGraphUpload",
)
"""Calls without which none can be put together again."""

_NO_SUCH = frozenset({"CUDA_ERROR_INVALID_VALUE"})
_NOT_THERE = frozenset({"CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_NOT_FOUND"})


class GraphCalls:
    """The calls of one driver that are about graphs.

    Args:
        driver: Whose.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.api = driver.api
        self._call = driver.call
        # Bindings of before CUDA 13 call the variant with the edges' data by a name of its own.
        self._get_edges, self._add_edges = (
            f"{name}_v2" if hasattr(self.api, f"{name}_v2") else name
            for name in ("cuGraphGetEdges", "cuGraphAddDependencies")
        )

    def demand(self, names: Sequence[str]) -> None:
        """That the driver has some calls, all of them.

        Raises:
            DeviceError: It lacks one.
        """
        missing = [name for name in names if not self.driver.has(name)]
        if missing:
            raise DeviceError(
                "the CUDA driver cannot say what is in a graph",
                expected=", ".join(missing),
                got="a driver without",
                hint="Update the driver, and cuda-bindings with it.",
            )

    def capability(self, ordinal: int) -> str:
        """A device's compute capability, such as `9.0`."""
        kinds = self.api.CUdevice_attribute
        what = "the GPU does not say what it can do"
        device = self._call("there is no such GPU", "cuDeviceGet", ordinal)
        return ".".join(
            str(int(self._call(what, "cuDeviceGetAttribute", kind, device)))
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )

    # -- what is in a graph ----------------------------------------------------------------------

    def nodes(self, graph: Graph) -> list[GraphNode]:
        """All nodes of a graph."""
        what = "the nodes of a graph cannot be read"
        _, count = self._call(what, "cuGraphGetNodes", graph, 0)
        found, _ = self._call(what, "cuGraphGetNodes", graph, count) if count else ([], 0)
        return list(found)

    def edges(self, graph: Graph) -> list[tuple[int, int, tuple[int, int, int]]]:
        """All edges of a graph.

        Returns:
            For each the numbers of the nodes that it leads from and to, as `int(node)` gives them,
            and its data: the ports at both ends and its type; all zero where it says: all of it.
        """
        what = "the edges of a graph cannot be read"
        *_, count = self._call(what, self._get_edges, graph, 0)
        if not count:
            return []
        sources, targets, data, _ = self._call(what, self._get_edges, graph, count)
        return [
            (int(source), int(target), (int(edge.from_port), int(edge.to_port), int(edge.type)))
            for source, target, edge in zip(sources, targets, data, strict=True)
        ]

    def kind(self, node: GraphNode) -> str:
        """What a node is, by the driver's name for it: `KERNEL`, `MEMSET`."""
        found = self._call("a graph's node has no type", "cuGraphNodeGetType", node)
        return str(found.name).removeprefix("CU_GRAPH_NODE_TYPE_")

    def kernel_params(self, node: GraphNode) -> Any:
        """A CUDA_KERNEL_NODE_PARAMS; what its pointers lead to is the node's own."""
        what = "the parameters of a kernel's node cannot be read"
        return self._call(what, "cuGraphKernelNodeGetParams", node)

    def memset_params(self, node: GraphNode) -> Any:
        """A CUDA_MEMSET_NODE_PARAMS."""
        what = "the parameters of a memset node cannot be read"
        return self._call(what, "cuGraphMemsetNodeGetParams", node)

    def memcpy_params(self, node: GraphNode) -> Any:
        """A CUDA_MEMCPY3D."""
        what = "the parameters of a memcpy node cannot be read"
        return self._call(what, "cuGraphMemcpyNodeGetParams", node)

    def node_attribute(self, node: GraphNode, attribute: Any) -> bytes | None:
        """An attribute of a kernel's node, as its bytes; None where the driver knows none such."""
        found = self.driver.ask(
            "an attribute of a kernel's node cannot be read",
            "cuGraphKernelNodeGetAttribute",
            node,
            attribute,
            no=_NO_SUCH,
        )
        return None if found is None else bytes(found.pad)

    def set_node_attribute(self, node: GraphNode, attribute: Any, value: bytes) -> None:
        """Sets an attribute to the bytes that one was read as."""
        what = "an attribute of a kernel's node cannot be set"
        held = self.api.CUkernelNodeAttrValue()
        held.pad = value
        self._call(what, "cuGraphKernelNodeSetAttribute", node, attribute, held)

    def knows_pointer(self, address: int) -> bool:
        """Whether an address is one of memory that the driver has given or locked."""
        kind = self.api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
        what = "the driver does not say what an address is"
        found = self.driver.ask(what, "cuPointerGetAttribute", kind, address, no=_NO_SUCH)
        return found is not None

    def allocation(self, address: int) -> tuple[int, int] | None:
        """Where the allocation around an address begins, and its bytes; None for no such."""
        what = "the driver does not say what is around an address"
        found = self.driver.ask(what, "cuMemGetAddressRange", address, no=_NOT_THERE)
        return None if found is None else (int(found[0]), int(found[1]))

    # -- graphs that are put together ------------------------------------------------------------

    def context(self) -> Any:
        """The context that is current in this thread."""
        return self._call("no context is current", "cuCtxGetCurrent")

    def new_graph(self) -> Graph:
        """A graph without nodes."""
        graph: Graph = self._call("no graph can be made", "cuGraphCreate", 0)
        return graph

    def destroy_graph(self, graph: Graph) -> None:
        """Ends a graph; what was made executable of it stays."""
        self._call("a graph cannot be ended", "cuGraphDestroy", graph)

    def add_kernel(self, graph: Graph, params: Any) -> GraphNode:
        """A kernel's node, behind nothing yet; the driver takes a copy of all parameters."""
        what = "a kernel cannot be put into a graph"
        node: GraphNode = self._call(what, "cuGraphAddKernelNode", graph, None, 0, params)
        return node

    def add_memset(self, graph: Graph, params: Any, context: Any) -> GraphNode:
        """A memset's node, behind nothing yet."""
        what = "a memset cannot be put into a graph"
        node: GraphNode = self._call(what, "cuGraphAddMemsetNode", graph, None, 0, params, context)
        return node

    def add_memcpy(self, graph: Graph, params: Any, context: Any) -> GraphNode:
        """A copy's node, behind nothing yet."""
        what = "a copy cannot be put into a graph"
        node: GraphNode = self._call(what, "cuGraphAddMemcpyNode", graph, None, 0, params, context)
        return node

    def add_empty(self, graph: Graph) -> GraphNode:
        """A node that does nothing but wait, behind nothing yet."""
        what = "a node cannot be put into a graph"
        node: GraphNode = self._call(what, "cuGraphAddEmptyNode", graph, None, 0)
        return node

    def add_edges(
        self,
        graph: Graph,
        sources: Sequence[GraphNode],
        targets: Sequence[GraphNode],
        data: Sequence[Any] | None = None,
    ) -> None:
        """Has each target wait for its source.

        Args:
            graph: Whose nodes they are.
            sources: As many as targets.
            targets: See above.
            data: A CUgraphEdgeData for each; None where all wait for all of it.
        """
        what, count = "the edges of a graph cannot be made", len(sources)
        self._call(what, self._add_edges, graph, list(sources), list(targets), data, count)

    def instantiate(self, graph: Graph) -> Executable:
        """What can be launched of a graph, as it is now."""
        flag = self.api.CUgraphInstantiate_flags.CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY
        made: Executable = self._call(
            "a graph cannot be made executable", "cuGraphInstantiate", graph, int(flag)
        )
        return made

    def upload(self, executable: Executable, stream: Stream) -> None:
        """Brings what a launch needs to the device, so that the first takes no longer."""
        self._call("a graph cannot be brought to the GPU", "cuGraphUpload", executable, stream)

    def launch(self, executable: Executable, stream: Stream) -> None:
        """Runs a graph, behind what the stream has to do by now."""
        self._call("a graph cannot be launched", "cuGraphLaunch", executable, stream)

    def destroy(self, executable: Executable) -> None:
        """Ends an executable graph."""
        self._call("an executable graph cannot be ended", "cuGraphExecDestroy", executable)
