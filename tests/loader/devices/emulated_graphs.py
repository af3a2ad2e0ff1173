"""The driver's graphs and kernels, emulated: what is launched really reads and writes the memory.

A kernel is a Python function, registered with a name, the layout of its parameters and what it says
that it needs (`KernelCode`). Handles begin somewhere else in each process, as a driver's do, so
that none can be carried over. A graph runs in its stream's turn, its nodes in an order that their
edges allow and that is not the one that they were made in: an edge that was lost shows.

Strict where the documentation is: nodes of another graph, edges twice, cycles, handles of what is
gone, more dynamic shared memory than the kernel was given, attributes of a function that is not
loaded yet. A kernel that touches what is not mapped is the loss of the device.
"""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver as real

from tests.loader.devices.refusal import Refused, require

SHARED_BY_DEFAULT = 48 << 10
MOST_SHARED = 227 << 10
_SETTABLE = {
    "MAX_DYNAMIC_SHARED_SIZE_BYTES": (0, MOST_SHARED),
    "PREFERRED_SHARED_MEMORY_CARVEOUT": (-1, 100),
    "NON_PORTABLE_CLUSTER_SIZE_ALLOWED": (0, 1),
}
_NODE_ATTRIBUTES = (
    "ACCESS_POLICY_WINDOW",
    "COOPERATIVE",
    "CLUSTER_DIMENSION",
    "CLUSTER_SCHEDULING_POLICY_PREFERENCE",
    "PRIORITY",
    "MEM_SYNC_DOMAIN_MAP",
    "MEM_SYNC_DOMAIN",
    "PREFERRED_SHARED_MEMORY_CARVEOUT",
)
_READ, _WRITE = 1, 3

VALUES = {
    **dict.fromkeys(("cuGraphGetNodes", "cuFuncGetParamInfo", "cuKernelGetParamInfo"), 2),
    "cuMemGetAddressRange": 2,
    "cuGraphGetEdges": 4,
    **dict.fromkeys(
        (
            "cuCtxGetCurrent",
            "cuFuncGetAttribute",
            "cuFuncGetModule",
            "cuFuncGetName",
            "cuGraphAddEmptyNode",
            "cuGraphAddKernelNode",
            "cuGraphAddMemcpyNode",
            "cuGraphAddMemsetNode",
            "cuGraphCreate",
            "cuGraphInstantiate",
            "cuGraphKernelNodeGetAttribute",
            "cuGraphKernelNodeGetParams",
            "cuGraphMemcpyNodeGetParams",
            "cuGraphMemsetNodeGetParams",
            "cuGraphNodeGetType",
            "cuKernelGetFunction",
            "cuKernelGetLibrary",
            "cuKernelGetName",
            "cuLibraryEnumerateKernels",
            "cuLibraryGetKernel",
            "cuLibraryGetKernelCount",
            "cuLibraryLoadData",
            "cuModuleEnumerateFunctions",
            "cuModuleGetFunctionCount",
            "cuPointerGetAttribute",
        ),
        1,
    ),
}
"""How many values each call gives beside its code."""


@dataclass(frozen=True)
class Launch:
    """What a kernel finds when it runs.

    Attributes:
        arguments: The bytes of each parameter.
        grid: Blocks.
        block: Threads in each.
        read: Bytes at an address of the device.
        write: Puts bytes there.
    """

    arguments: tuple[bytes, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]

    @property
    def numbers(self) -> list[int]:
        """The parameters, each as one number."""
        return [int.from_bytes(argument, "little") for argument in self.arguments]


@dataclass(frozen=True)
class KernelCode:
    """A kernel as a compiler would leave it.

    Attributes:
        name: Mangled or not.
        run: What it does.
        layout: The offset and size of each parameter.
        attributes: By the driver's names, such as `NUM_REGS`.
    """

    name: str
    run: Callable[[Launch], None]
    layout: tuple[tuple[int, int], ...]
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass
class _Function:
    code: KernelCode
    module: int
    attributes: dict[str, int]
    loaded: bool = False


@dataclass
class _Module:
    functions: list[int] = field(default_factory=list)
    kernels: list[int] = field(default_factory=list)
    library: int = 0


@dataclass
class _Node:
    graph: int
    kind: str
    params: Any = None
    block: bytes = b""
    attributes: dict[int, bytes] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)


@dataclass
class _Graph:
    nodes: list[int] = field(default_factory=list)
    edges: dict[tuple[int, int], tuple[int, int, int]] = field(default_factory=dict)


class EmulatedGraphs:
    """The part of the emulated driver that has graphs; see the module.

    Attributes:
        images: What `cuLibraryLoadData` takes: the kernels of each.
    """

    def __init__(self) -> None:
        self.images: dict[bytes, Sequence[KernelCode]] = {}
        self._graph_numbers = iter(range((int.from_bytes(os.urandom(5)) | 1 << 40) << 8, 1 << 62))
        self._functions: dict[int, _Function] = {}
        self._modules: dict[int, _Module] = {}
        self._kernels: dict[int, int] = {}
        self._libraries: dict[int, int] = {}
        self._loaded: set[int] = set()
        self._graphs: dict[int, _Graph] = {}
        self._nodes: dict[int, _Node] = {}
        self._executables: dict[int, list[Callable[[], None]]] = {}

    # -- what tests do ---------------------------------------------------------------------------

    def load_module(self, codes: Sequence[KernelCode], into: Any = None) -> list[Any]:
        """Has a module with these kernels, as a library of the machine's would have made it.

        Args:
            codes: The kernels.
            into: A function whose module gets them; by default they have one of their own.

        Returns:
            The functions, in the same order.
        """
        number = None if into is None else self._function(into).module
        found = self._new_module(codes, number).functions[-len(codes) :]
        return [real.CUfunction(function) for function in found]

    def load_kernels(self, codes: Sequence[KernelCode]) -> list[Any]:
        """The same, but what is given is the library's kernels, which no context has yet."""
        return [real.CUkernel(number) for number in self._new_library(codes).kernels]

    def add_other(self, graph: Any, kind: str) -> Any:
        """Adds a node of any kind, as an odd capture would: `HOST`, `CONDITIONAL`."""
        getattr(real.CUgraphNodeType, f"CU_GRAPH_NODE_TYPE_{kind}")
        return self._new_node(graph, [], _Node(int(graph), kind))

    def graphs_left(self) -> list[str]:
        """What was made of graphs and not given back."""
        return [
            *(f"graph {number:#x}" for number in self._graphs),
            *(f"executable graph {number:#x}" for number in self._executables),
            *(f"library {number:#x}" for number in self._loaded),
        ]

    def _number(self) -> int:
        return next(self._graph_numbers)

    def _new_module(self, codes: Sequence[KernelCode], number: int | None = None) -> _Module:
        number = self._number() if number is None else number
        module = self._modules.setdefault(number, _Module())
        for code in codes:
            defaults = {
                "MAX_THREADS_PER_BLOCK": 1024,
                "SHARED_SIZE_BYTES": 0,
                "NUM_REGS": 32,
                "BINARY_VERSION": 90,
                "MAX_DYNAMIC_SHARED_SIZE_BYTES": SHARED_BY_DEFAULT,
                "PREFERRED_SHARED_MEMORY_CARVEOUT": -1,
                "NON_PORTABLE_CLUSTER_SIZE_ALLOWED": 0,
            }
            function = self._number()
            self._functions[function] = _Function(code, number, {**defaults, **code.attributes})
            module.functions.append(function)
        return module

    def _new_library(self, codes: Sequence[KernelCode]) -> _Module:
        module, library = self._new_module(codes), self._number()
        number = next(number for number, found in self._modules.items() if found is module)
        module.library = library
        self._libraries[library] = number
        for function in module.functions:
            kernel = self._number()
            self._kernels[kernel] = function
            module.kernels.append(kernel)
        return module

    # -- kernels, modules, libraries -------------------------------------------------------------

    def cuCtxGetCurrent(self):
        def call() -> Any:
            device = getattr(self._current, "device", None)
            return real.CUcontext(0 if device is None else 0x100 + device)

        return self._do("cuCtxGetCurrent", call)

    def cuFuncGetName(self, hfunc):
        return self._do("cuFuncGetName", lambda: self._function(hfunc).code.name.encode())

    def cuFuncGetModule(self, hfunc):
        return self._do(
            "cuFuncGetModule",
            lambda: real.CUmodule(self._function(hfunc).module),
            in_context=True,
        )

    def cuFuncGetParamInfo(self, func, paramIndex):
        return self._do(
            "cuFuncGetParamInfo", lambda: self._parameter(self._function(func), paramIndex)
        )

    def cuFuncGetAttribute(self, attrib, hfunc):
        def call() -> int:
            function = self._function(hfunc)
            if not function.loaded:
                raise Refused("CUDA_ERROR_FUNCTION_NOT_LOADED")
            found = function.attributes
            name = real.CUfunction_attribute(attrib).name.removeprefix("CU_FUNC_ATTRIBUTE_")
            require(name != "MAX")
            return found.get(name, 0)

        return self._do("cuFuncGetAttribute", call, in_context=True)

    def cuFuncLoad(self, function):
        def call() -> None:
            self._function(function).loaded = True

        return self._do("cuFuncLoad", call, in_context=True)

    def cuFuncSetAttribute(self, hfunc, attrib, value):
        def call() -> None:
            function = self._function(hfunc)
            name = real.CUfunction_attribute(attrib).name.removeprefix("CU_FUNC_ATTRIBUTE_")
            require(name in _SETTABLE)
            least, most = _SETTABLE[name]
            if name == "MAX_DYNAMIC_SHARED_SIZE_BYTES":
                most -= function.attributes["SHARED_SIZE_BYTES"]
            require(least <= value <= most)
            function.attributes[name] = value

        return self._do("cuFuncSetAttribute", call, in_context=True)

    def cuModuleGetFunctionCount(self, mod):
        return self._do("cuModuleGetFunctionCount", lambda: len(self._module(mod).functions))

    def cuModuleEnumerateFunctions(self, numFunctions, mod):
        def call() -> Any:
            found = self._module(mod).functions
            require(numFunctions > 0)
            return [real.CUfunction(number) for number in found[:numFunctions]]

        return self._do("cuModuleEnumerateFunctions", call, in_context=True)

    def cuKernelGetName(self, hfunc):
        return self._do("cuKernelGetName", lambda: self._kernel(hfunc).code.name.encode())

    def cuKernelGetParamInfo(self, kernel, paramIndex):
        return self._do(
            "cuKernelGetParamInfo", lambda: self._parameter(self._kernel(kernel), paramIndex)
        )

    def cuKernelGetFunction(self, kernel):
        def call() -> Any:
            self._kernel(kernel)
            return real.CUfunction(self._kernels[int(kernel)])

        return self._do("cuKernelGetFunction", call, in_context=True)

    def cuKernelGetLibrary(self, kernel):
        def call() -> Any:
            return real.CUlibrary(self._modules[self._kernel(kernel).module].library)

        return self._do("cuKernelGetLibrary", call)

    def cuLibraryGetKernelCount(self, lib):
        return self._do("cuLibraryGetKernelCount", lambda: len(self._library(lib).kernels))

    def cuLibraryEnumerateKernels(self, numKernels, lib):
        def call() -> Any:
            found = self._library(lib).kernels
            require(numKernels > 0)
            return [real.CUkernel(number) for number in found[:numKernels]]

        return self._do("cuLibraryEnumerateKernels", call)

    def cuLibraryGetKernel(self, library, name):
        def call() -> Any:
            require(isinstance(name, bytes))
            for number in self._library(library).kernels:
                if self._functions[self._kernels[number]].code.name == name.decode():
                    return real.CUkernel(number)
            raise Refused("CUDA_ERROR_NOT_FOUND")

        return self._do("cuLibraryGetKernel", call)

    def cuLibraryLoadData(
        self,
        code,
        jitOptions,
        jitOptionsValues,
        numJitOptions,
        libraryOptions,
        libraryOptionValues,
        numLibraryOptions,
    ):
        def call() -> Any:
            require(numJitOptions == len(jitOptions) == len(jitOptionsValues) == 0)
            require(numLibraryOptions == len(libraryOptions) == len(libraryOptionValues) == 0)
            if code not in self.images:
                raise Refused("CUDA_ERROR_INVALID_IMAGE")
            library = self._new_library(self.images[code]).library
            self._loaded.add(library)
            return real.CUlibrary(library)

        return self._do("cuLibraryLoadData", call)

    def cuLibraryUnload(self, library):
        def call() -> None:
            require(int(library) in self._loaded)
            self._loaded.remove(int(library))
            module = self._modules.pop(self._libraries.pop(int(library)))
            for kernel in module.kernels:
                del self._functions[self._kernels.pop(kernel)]

        return self._do("cuLibraryUnload", call)

    def _function(self, function: Any) -> _Function:
        return _held(self._functions, function)

    def _kernel(self, kernel: Any) -> _Function:
        return self._functions[_held(self._kernels, kernel)]

    def _module(self, module: Any) -> _Module:
        return _held(self._modules, module)

    def _library(self, library: Any) -> _Module:
        return self._modules[_held(self._libraries, library)]

    def _parameter(self, function: _Function, number: int) -> tuple[int, int]:
        require(0 <= number < len(function.code.layout))
        return function.code.layout[number]

    # -- pointers --------------------------------------------------------------------------------

    def cuPointerGetAttribute(self, attribute, ptr):
        def call() -> Any:
            require(attribute == real.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
            if any(at <= int(ptr) < at + mapped.size for at, mapped in self._mapped.items()):
                return real.CUmemorytype.CU_MEMORYTYPE_DEVICE
            require(any(at <= int(ptr) < at + size for at, size in self._registered.items()))
            return real.CUmemorytype.CU_MEMORYTYPE_HOST

        return self._do("cuPointerGetAttribute", call, in_context=True)

    def cuMemGetAddressRange(self, dptr):
        def call() -> tuple[Any, int]:
            for at, mapped in self._mapped.items():
                if at <= int(dptr) < at + mapped.size:
                    return real.CUdeviceptr(at), mapped.size
            raise Refused("CUDA_ERROR_NOT_FOUND")

        return self._do("cuMemGetAddressRange", call, in_context=True)

    # -- graphs ----------------------------------------------------------------------------------

    def cuGraphCreate(self, flags):
        def call() -> Any:
            require(flags == 0)
            number = self._number()
            self._graphs[number] = _Graph()
            return real.CUgraph(number)

        return self._do("cuGraphCreate", call)

    def cuGraphDestroy(self, hGraph):
        def call() -> None:
            for node in _valid(self._graphs, hGraph).nodes:
                del self._nodes[node]
            del self._graphs[int(hGraph)]

        return self._do("cuGraphDestroy", call)

    def cuGraphGetNodes(self, hGraph, numNodes=0):
        def call() -> tuple[Any, int]:
            found = _valid(self._graphs, hGraph).nodes
            given = found[:numNodes] + [0] * (numNodes - len(found))
            count = min(numNodes, len(found)) if numNodes else len(found)
            return [real.CUgraphNode(number) for number in given], count

        return self._do("cuGraphGetNodes", call)

    def cuGraphGetEdges(self, hGraph, numEdges=0):
        def call() -> tuple[Any, Any, Any, int]:
            found = list(_valid(self._graphs, hGraph).edges.items())
            given = found[:numEdges]
            sources = [real.CUgraphNode(source) for (source, _), _ in given]
            targets = [real.CUgraphNode(target) for (_, target), _ in given]
            data = [_edge_data(*value) for _, value in given]
            return sources, targets, data, len(given) if numEdges else len(found)

        return self._do("cuGraphGetEdges", call)

    def cuGraphNodeGetType(self, hNode):
        def call() -> Any:
            kind = _valid(self._nodes, hNode).kind
            return getattr(real.CUgraphNodeType, f"CU_GRAPH_NODE_TYPE_{kind}")

        return self._do("cuGraphNodeGetType", call)

    def _node_of(self, node: Any, kind: str) -> _Node:
        found = _valid(self._nodes, node)
        require(found.kind == kind)
        return found

    def _new_node(self, graph: Any, dependencies: Sequence[Any], node: _Node) -> Any:
        into = _valid(self._graphs, graph)
        before = [int(dependency) for dependency in dependencies]
        require(len(set(before)) == len(before) and all(n in into.nodes for n in before))
        number = self._number()
        self._nodes[number] = node
        into.nodes.append(number)
        into.edges.update({(source, number): (0, 0, 0) for source in before})
        return real.CUgraphNode(number)

    def cuGraphAddEmptyNode(self, hGraph, dependencies, numDependencies):
        def call() -> Any:
            before = _counted(dependencies, numDependencies)
            return self._new_node(hGraph, before, _Node(int(hGraph), "EMPTY"))

        return self._do("cuGraphAddEmptyNode", call)

    def cuGraphAddKernelNode(self, hGraph, dependencies, numDependencies, nodeParams):
        def call() -> Any:
            before = _counted(dependencies, numDependencies)
            given = {name: getattr(nodeParams, name) for name in _KERNEL_FIELDS}
            handle, kernel = int(nodeParams.func), int(nodeParams.kern)
            function = self._function(handle) if handle else self._kernel(kernel)
            block = tuple(given[f"blockDim{axis}"] for axis in "XYZ")
            grid = tuple(given[f"gridDim{axis}"] for axis in "XYZ")
            require(all(size > 0 for size in (*block, *grid)))
            require(block[0] * block[1] * block[2] <= function.attributes["MAX_THREADS_PER_BLOCK"])
            most = function.attributes["MAX_DYNAMIC_SHARED_SIZE_BYTES"]
            require(given["sharedMemBytes"] <= most)
            node = _Node(int(hGraph), "KERNEL", (handle, kernel, given))
            node.block = _parameters(function.code.layout, nodeParams)
            function.loaded = True
            return self._new_node(hGraph, before, node)

        return self._do("cuGraphAddKernelNode", call, in_context=True)

    def cuGraphKernelNodeGetParams(self, hNode):
        def call() -> Any:
            node = self._node_of(hNode, "KERNEL")
            handle, kernel, given = node.params
            params = real.CUDA_KERNEL_NODE_PARAMS()
            for name, value in given.items():
                setattr(params, name, value)
            params.func, params.kern = real.CUfunction(handle), real.CUkernel(kernel)
            layout = self._functions[handle or self._kernels[kernel]].code.layout
            if layout:
                # The node's own memory, which lives as long as it does.
                held = ctypes.create_string_buffer(node.block, len(node.block))
                at = ctypes.addressof(held)
                table = (ctypes.c_uint64 * len(layout))(*(at + offset for offset, _ in layout))
                node.held += [held, table]
                params.kernelParams = ctypes.addressof(table)
            return params

        return self._do("cuGraphKernelNodeGetParams", call)

    def cuGraphKernelNodeGetAttribute(self, hNode, attr):
        def call() -> Any:
            node, value = self._node_of(hNode, "KERNEL"), real.CUkernelNodeAttrValue()
            require(_attribute_name(attr) in _NODE_ATTRIBUTES)
            value.pad = node.attributes.get(int(attr), bytes(64))
            return value

        return self._do("cuGraphKernelNodeGetAttribute", call)

    def cuGraphKernelNodeSetAttribute(self, hNode, attr, value):
        def call() -> None:
            node = self._node_of(hNode, "KERNEL")
            require(_attribute_name(attr) in _NODE_ATTRIBUTES)
            if _attribute_name(attr) == "CLUSTER_DIMENSION":
                size, grid = value.clusterDim, node.params[2]
                require(all(getattr(size, axis) > 0 for axis in "xyz"))
                require(not any(grid[f"gridDim{a.upper()}"] % getattr(size, a) for a in "xyz"))
            node.attributes[int(attr)] = bytes(value.pad)

        return self._do("cuGraphKernelNodeSetAttribute", call)

    def cuGraphAddMemsetNode(self, hGraph, dependencies, numDependencies, memsetParams, ctx):
        def call() -> Any:
            before, m = _counted(dependencies, numDependencies), memsetParams
            require(int(ctx) - 0x100 in self._contexts and m.elementSize in (1, 2, 4))
            require(m.width > 0 and m.height > 0)
            require(m.height == 1 or m.pitch >= m.width * m.elementSize)
            given = {name: getattr(m, name) for name in _MEMSET_FIELDS}
            given["dst"] = int(given["dst"])
            return self._new_node(hGraph, before, _Node(int(hGraph), "MEMSET", given))

        return self._do("cuGraphAddMemsetNode", call, in_context=True)

    def cuGraphMemsetNodeGetParams(self, hNode):
        def call() -> Any:
            params = real.CUDA_MEMSET_NODE_PARAMS()
            for name, value in self._node_of(hNode, "MEMSET").params.items():
                setattr(params, name, real.CUdeviceptr(value) if name == "dst" else value)
            return params

        return self._do("cuGraphMemsetNodeGetParams", call)

    def cuGraphAddMemcpyNode(self, hGraph, dependencies, numDependencies, copyParams, ctx):
        def call() -> Any:
            before, c = _counted(dependencies, numDependencies), copyParams
            require(int(ctx) - 0x100 in self._contexts)
            require(c.WidthInBytes > 0 and c.Height > 0 and c.Depth > 0)
            given = {name: getattr(c, name) for name in _MEMCPY_FIELDS}
            for name in ("srcDevice", "dstDevice"):
                given[name] = int(given[name])
            return self._new_node(hGraph, before, _Node(int(hGraph), "MEMCPY", given))

        return self._do("cuGraphAddMemcpyNode", call, in_context=True)

    def cuGraphMemcpyNodeGetParams(self, hNode):
        def call() -> Any:
            params = real.CUDA_MEMCPY3D()
            for name, value in self._node_of(hNode, "MEMCPY").params.items():
                device = name in ("srcDevice", "dstDevice")
                setattr(params, name, real.CUdeviceptr(value) if device else value)
            return params

        return self._do("cuGraphMemcpyNodeGetParams", call)

    def cuGraphAddDependencies(self, hGraph, from_, to, edgeData, numDependencies):
        def call() -> None:
            graph, data = _valid(self._graphs, hGraph), edgeData or []
            require(len(from_) == len(to) == numDependencies)
            require(not data or len(data) == numDependencies)
            added: dict[tuple[int, int], tuple[int, int, int]] = {}
            for number, pair in enumerate(zip(map(int, from_), map(int, to), strict=True)):
                require(pair[0] in graph.nodes and pair[1] in graph.nodes)
                require(pair[0] != pair[1] and pair not in graph.edges and pair not in added)
                edge = data[number] if data else _edge_data(0, 0, 0)
                real.CUgraphDependencyType(edge.type)
                require(edge.to_port == 0)
                require(edge.from_port == 0 or self._nodes[pair[0]].kind == "KERNEL")
                added[pair] = (edge.from_port, edge.to_port, edge.type)
            graph.edges.update(added)

        return self._do("cuGraphAddDependencies", call)

    # -- executable graphs -----------------------------------------------------------------------

    def cuGraphInstantiate(self, hGraph, flags):
        def call() -> Any:
            graph, number = _valid(self._graphs, hGraph), self._number()
            require(0 <= flags < 16)
            self._executables[number] = [self._work(self._nodes[n]) for n in _order(graph)]
            return real.CUgraphExec(number)

        return self._do("cuGraphInstantiate", call, in_context=True)

    def cuGraphExecDestroy(self, hGraphExec):
        def call() -> None:
            _valid(self._executables, hGraphExec)
            del self._executables[int(hGraphExec)]

        return self._do("cuGraphExecDestroy", call)

    def cuGraphUpload(self, hGraphExec, hStream):
        def call() -> None:
            _valid(self._executables, hGraphExec)
            self._stream(hStream)

        return self._do("cuGraphUpload", call, in_context=True)

    def cuGraphLaunch(self, hGraphExec, hStream):
        def call() -> None:
            works = _valid(self._executables, hGraphExec)

            def land() -> None:
                for work in works:
                    work()

            self._stream(hStream).put(land)

        return self._do("cuGraphLaunch", call, in_context=True)

    def _work(self, node: _Node) -> Callable[[], None]:
        """What a node does, as it is now: an executable graph is a copy."""
        require(node.kind in ("KERNEL", "MEMSET", "MEMCPY", "EMPTY"))
        if node.kind == "KERNEL":
            handle, kernel, given = node.params
            code = self._functions[handle or self._kernels[kernel]].code
            launch = Launch(
                tuple(node.block[offset : offset + size] for offset, size in code.layout),
                tuple(given[f"gridDim{axis}"] for axis in "XYZ"),
                tuple(given[f"blockDim{axis}"] for axis in "XYZ"),
                self._read_device,
                self._write_device,
            )
            return lambda: _run(code, launch)
        given = dict(node.params or {})
        if node.kind == "MEMSET":
            return lambda: self._memset(given)
        if node.kind == "MEMCPY":
            return lambda: self._memcpy(given)
        return lambda: None

    def _read_device(self, address: int, size: int) -> bytes:
        self._check_reach(address, size, _READ)
        return ctypes.string_at(address, size)

    def _write_device(self, address: int, data: bytes) -> None:
        self._check_reach(address, len(data), _WRITE)
        ctypes.memmove(address, data, len(data))

    def _memset(self, m: dict[str, Any]) -> None:
        row = (m["value"] & (1 << 8 * m["elementSize"]) - 1).to_bytes(m["elementSize"], "little")
        for number in range(m["height"]):
            self._write_device(m["dst"] + number * m["pitch"], row * m["width"])

    def _memcpy(self, c: dict[str, Any]) -> None:
        for z in range(c["Depth"]):
            for y in range(c["Height"]):
                source, target = (
                    c[f"{end}Device"]
                    + c[f"{end}XInBytes"]
                    + ((c[f"{end}Z"] + z) * c[f"{end}Height"] + c[f"{end}Y"] + y) * c[f"{end}Pitch"]
                    for end in ("src", "dst")
                )
                self._write_device(target, self._read_device(source, c["WidthInBytes"]))


_KERNEL_FIELDS = (
    *(f"{what}{axis}" for what in ("gridDim", "blockDim") for axis in "XYZ"),
    "sharedMemBytes",
)
_MEMSET_FIELDS = ("dst", "pitch", "value", "elementSize", "width", "height")
_MEMCPY_FIELDS = (
    *(
        f"{end}{what}"
        for end in ("src", "dst")
        for what in ("XInBytes", "Y", "Z", "LOD", "MemoryType", "Host", "Device", "Pitch", "Height")
    ),
    "WidthInBytes",
    "Height",
    "Depth",
)


def _valid(held: dict[int, Any], handle: Any) -> Any:
    require(int(handle) in held)
    return held[int(handle)]


def _held(held: dict[int, Any], handle: Any) -> Any:
    if int(handle) not in held:
        raise Refused("CUDA_ERROR_INVALID_HANDLE")
    return held[int(handle)]


def _counted(dependencies: Sequence[Any] | None, count: int) -> Sequence[Any]:
    require(len(dependencies or ()) == count)
    return dependencies or ()


def _attribute_name(attribute: Any) -> str:
    name = real.CUkernelNodeAttrID(attribute).name
    return str(name).removeprefix("CU_LAUNCH_ATTRIBUTE_")


def _edge_data(from_port: int, to_port: int, kind: int) -> Any:
    edge = real.CUgraphEdgeData()
    edge.from_port, edge.to_port, edge.type = from_port, to_port, kind
    return edge


def _parameters(layout: Sequence[tuple[int, int]], params: Any) -> bytes:
    """The parameters of a kernel in one block, each at its offset, as its node gives them."""
    block = bytearray(max((offset + size for offset, size in layout), default=0))
    table, extra = int(params.kernelParams or 0), int(params.extra or 0)
    require(bool(layout) <= bool(table or extra) and not (table and extra))
    if extra:
        first = (ctypes.c_uint64 * 5).from_address(extra)
        require((first[0], first[2], first[4]) == (1, 2, 0))
        size = ctypes.c_size_t.from_address(first[3]).value
        require(size >= len(block))
        return ctypes.string_at(first[1], len(block))
    pointers = (ctypes.c_uint64 * len(layout)).from_address(table) if layout else ()
    for (offset, size), pointer in zip(layout, pointers, strict=True):
        block[offset : offset + size] = ctypes.string_at(pointer, size)
    return bytes(block)


def _order(graph: _Graph) -> list[int]:
    """The nodes in an order that the edges allow: of those that may run the last one first."""
    waiting = dict.fromkeys(graph.nodes, 0)
    behind: dict[int, list[int]] = {node: [] for node in graph.nodes}
    for source, target in graph.edges:
        waiting[target] += 1
        behind[source].append(target)
    ready, found = [node for node, count in waiting.items() if not count], []
    while ready:
        found.append(node := ready.pop())
        for target in behind[node]:
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    require(len(found) == len(graph.nodes))
    return found


def _run(code: KernelCode, launch: Launch) -> None:
    try:
        code.run(launch)
    except Refused:
        raise
    except Exception as error:  # whatever a kernel does wrong
        traceback.print_exc()
        raise Refused("CUDA_ERROR_LAUNCH_FAILED") from error
