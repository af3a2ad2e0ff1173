"""Graph calls: their arguments are the bindings', and the emulator's rules are the driver's."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cuda.bindings import driver as real

from coldframe.loader.devices.driver import Driver
from coldframe.loader.devices.graph_calls import REBUILDING, GraphCalls
from coldframe.loader.devices.kernel_calls import KernelCalls
from coldframe.loader.errors import DeviceError, DeviceLost
from tests.loader.devices.emulated_graphs import KernelCode, Launch
from tests.loader.devices.emulator import Emulator
from tests.snapshot.graph_kit import BARE, MIX, SIZE, Device


@pytest.fixture
def device(emulator: Emulator) -> Iterator[Device]:
    device = Device(emulator=emulator)
    yield device
    if not emulator.is_lost:
        device.close()


def test_arguments_are_what_the_bindings_take() -> None:
    """The bindings convert all arguments before they look for a library, and find none."""
    try:
        real.cuInit(0)
    except RuntimeError:
        pass
    else:
        pytest.skip("there is a driver here, to which these arguments would go")
    calls, kernels = GraphCalls(Driver(real)), KernelCalls(Driver(real))
    graph, node, context = real.CUgraph(1), real.CUgraphNode(1), real.CUcontext(1)
    function, kernel = real.CUfunction(1), real.CUkernel(1)
    attribute = real.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_PRIORITY
    made, stream = real.CUgraphExec(1), real.CUstream(1)
    made_with: list[Callable[[], Any]] = [
        lambda: calls.capability(0),
        lambda: calls.nodes(graph),
        lambda: calls.edges(graph),
        lambda: calls.kind(node),
        lambda: calls.kernel_params(node),
        lambda: calls.memset_params(node),
        lambda: calls.memcpy_params(node),
        lambda: calls.node_attribute(node, attribute),
        lambda: calls.set_node_attribute(node, attribute, bytes(64)),
        lambda: calls.knows_pointer(1 << 45),
        lambda: calls.allocation(1 << 45),
        lambda: calls.context(),
        lambda: calls.new_graph(),
        lambda: calls.destroy_graph(graph),
        lambda: calls.add_kernel(graph, real.CUDA_KERNEL_NODE_PARAMS()),
        lambda: calls.add_memset(graph, real.CUDA_MEMSET_NODE_PARAMS(), context),
        lambda: calls.add_memcpy(graph, real.CUDA_MEMCPY3D(), context),
        lambda: calls.add_empty(graph),
        lambda: calls.add_edges(graph, [node], [node]),
        lambda: calls.add_edges(graph, (node, node), (node, node), [real.CUgraphEdgeData()] * 2),
        lambda: calls.instantiate(graph),
        lambda: calls.upload(made, stream),
        lambda: calls.launch(made, stream),
        lambda: calls.destroy(made),
        lambda: kernels.name(function),
        lambda: kernels.kernel_name(kernel),
        lambda: kernels.layout(function),
        lambda: kernels.kernel_layout(kernel),
        lambda: kernels.attribute(function, "NUM_REGS"),
        lambda: kernels.set_attribute(function, "MAX_DYNAMIC_SHARED_SIZE_BYTES", 1),
        lambda: kernels.module_of(function),
        lambda: kernels.library_of(kernel),
        lambda: kernels.functions(real.CUmodule(1)),
        lambda: kernels.kernels(real.CUlibrary(1)),
        lambda: kernels.function_of(kernel),
        lambda: kernels.load_library(b"image"),
        lambda: kernels.unload_library(real.CUlibrary(1)),
        lambda: kernels.library_kernel(real.CUlibrary(1), "name"),
    ]
    for call in made_with:
        with pytest.raises(DeviceError, match="a driver with cu"):
            call()


def test_every_name_that_is_asked_for_is_one_of_the_bindings() -> None:
    assert [name for name in REBUILDING if not hasattr(real, name)] == []


def test_a_driver_without_a_call_is_told_so() -> None:
    calls = GraphCalls(Driver.open(Emulator(missing=["cuFuncGetParamInfo", "cuGraphUpload"])))
    with pytest.raises(DeviceError, match="expected cuFuncGetParamInfo, cuGraphUpload, got a dr"):
        calls.demand(REBUILDING)


def test_a_graph_does_what_its_nodes_say_in_the_order_of_its_edges(device: Device) -> None:
    graph, at = device.graph(), device.base("kv")
    first = device.kernel(graph, MIX, (at, at, 1, 8))
    second = device.kernel(graph, MIX, (at, at, 2, 8), before=[first])
    device.kernel(graph, MIX, (at, at, 3, 8), before=[second])
    ctypes.memset(at, 1, 8)
    device.launch(graph)
    assert ctypes.string_at(at, 8) == bytes([(((1 * 4 + 1) * 4 + 2) * 4 + 3)]) * 8


def test_what_is_executable_is_a_copy(device: Device) -> None:
    graph, at = device.calls.new_graph(), device.base("kv")
    device.kernel(graph, MIX, (at, at, 1, 8))
    executable = device.calls.instantiate(graph)
    device.calls.destroy_graph(graph)
    ctypes.memset(at, 1, 8)
    device.run(executable)
    assert ctypes.string_at(at, 8) == bytes([5]) * 8
    device.calls.destroy(executable)


def test_nothing_runs_before_its_streams_turn(emulator: Emulator, device: Device) -> None:
    graph, at = device.graph(), device.base("kv")
    device.kernel(graph, MIX, (at, at, 1, 8))
    executable, stream = device.calls.instantiate(graph), device.driver.stream()
    ctypes.memset(at, 1, 8)
    emulator.hold()
    device.calls.launch(executable, stream)
    assert ctypes.string_at(at, 8) == bytes([1]) * 8
    emulator.go.set()
    device.driver.synchronize(stream)
    assert ctypes.string_at(at, 8) == bytes([5]) * 8
    device.driver.destroy_stream(stream)
    device.calls.destroy(executable)


def _raise(launch: Launch) -> None:
    raise ArithmeticError


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (KernelCode("far", lambda launch: launch.write(1 << 40, b"x"), ()), "ILLEGAL_ADDRESS"),
        (KernelCode("wild", _raise, ()), "LAUNCH_FAILED"),
    ],
)
def test_a_kernel_that_goes_wrong_loses_the_device(
    emulator: Emulator, device: Device, code: KernelCode, error: str
) -> None:
    graph = device.graph()
    (function,) = emulator.load_module([code])
    device.kernel(graph, code, (), function=function)
    with pytest.raises(DeviceLost, match=error):
        device.run(device.calls.instantiate(graph))


def _cycle(device: Device, graph: Any) -> None:
    first, second = (device.calls.add_empty(graph) for _ in range(2))
    device.edges(graph, [(first, second), (second, first)])
    device.calls.instantiate(graph)


def _another_graphs_node(device: Device, graph: Any) -> None:
    device.edges(graph, [(device.calls.add_empty(device.graph()), device.calls.add_empty(graph))])


def _an_edge_twice(device: Device, graph: Any) -> None:
    pair = (device.calls.add_empty(graph), device.calls.add_empty(graph))
    device.edges(graph, [pair])
    device.edges(graph, [pair])


def _a_port_of_no_kernel(device: Device, graph: Any) -> None:
    pair = [device.calls.add_empty(graph)], [device.calls.add_empty(graph)]
    edge = real.CUgraphEdgeData()
    edge.from_port = 1
    device.calls.add_edges(graph, *pair, [edge])


WRONG: dict[str, Callable[[Device, Any], object]] = {
    "a cycle": _cycle,
    "another graph's node": _another_graphs_node,
    "an edge twice": _an_edge_twice,
    "a port of no kernel": _a_port_of_no_kernel,
    "no such graph": lambda device, graph: device.calls.nodes(real.CUgraph(7)),
    "no such node": lambda device, graph: device.calls.kind(real.CUgraphNode(7)),
    "no kernel's node": lambda device, graph: device.calls.kernel_params(
        device.calls.add_empty(graph)
    ),
    "too much shared memory": lambda device, graph: device.kernel(graph, BARE, (), shared=49153),
    "too many threads": lambda device, graph: device.kernel(graph, BARE, (), block=(1025, 1, 1)),
    "no blocks": lambda device, graph: device.kernel(graph, BARE, (), grid=(0, 1, 1)),
    "a host function": lambda device, graph: device.calls.instantiate(
        (device.emulator.add_other(graph, "HOST"), graph)[1]
    ),
    "an attribute that none can set": lambda device, graph: KernelCalls(
        device.driver
    ).set_attribute(device.functions[BARE.name], "NUM_REGS", 8),
    "an executable twice destroyed": lambda device, graph: [
        device.calls.destroy(made) for made in [device.calls.instantiate(graph)] * 2
    ],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_the_documentation_forbids_is_an_error(device: Device, wrong: str) -> None:
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        WRONG[wrong](device, device.graph())


def test_more_shared_memory_can_be_had_by_asking(device: Device) -> None:
    kernels, function = KernelCalls(device.driver), device.functions[BARE.name]
    kernels.set_attribute(function, "MAX_DYNAMIC_SHARED_SIZE_BYTES", 100 << 10)
    device.kernel(device.graph(), BARE, (), shared=100 << 10)


def test_kernels_of_a_library(emulator: Emulator, device: Device) -> None:
    kernels = KernelCalls(device.driver)
    emulator.images[b"cubin"] = (MIX, BARE)
    library = kernels.load_library(b"cubin")
    kernel = kernels.library_kernel(library, MIX.name)
    assert kernels.kernel_name(kernel) == MIX.name
    assert kernels.kernel_layout(kernel) == MIX.layout
    assert [int(found) for found in kernels.kernels(library)].index(int(kernel)) == 0
    assert int(kernels.library_of(kernel)) == int(library)
    function = kernels.function_of(kernel)
    assert (kernels.name(function), kernels.layout(function)) == (MIX.name, MIX.layout)
    with pytest.raises(DeviceError, match="FUNCTION_NOT_LOADED"):
        kernels.attribute(function, "NUM_REGS")
    kernels.load(function)
    assert kernels.attribute(function, "NUM_REGS") == 24
    with pytest.raises(
        DeviceError, match=r"no such kernel, in cuLibraryGetKernel, none, got .*NOT"
    ):
        kernels.library_kernel(library, "none")
    kernels.unload_library(library)
    with pytest.raises(DeviceError, match="INVALID_HANDLE"):
        kernels.function_of(kernel)
    with pytest.raises(DeviceError, match="INVALID_IMAGE"):
        kernels.load_library(b"something else")


def test_the_driver_knows_its_own_pointers(emulator: Emulator, device: Device) -> None:
    at = device.base("kv")
    assert device.calls.knows_pointer(at + 5)
    assert device.calls.allocation(at + 5) == (at, SIZE)
    assert not device.calls.knows_pointer(at + SIZE)
    assert device.calls.allocation(at + SIZE) is None
    page = ctypes.create_string_buffer(8192)
    device.driver.register_host(ctypes.addressof(page), 8192)
    assert device.calls.knows_pointer(ctypes.addressof(page) + 5)
    device.driver.unregister_host(ctypes.addressof(page))


def test_handles_are_others_in_another_process() -> None:
    code = (
        "from tests.snapshot.graph_kit import MIX, Device\nprint(int(Device().functions[MIX.name]))"
    )
    ran = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert len({process.communicate(timeout=60)[0] for process in ran}) == 2
    assert [process.returncode for process in ran] == [0, 0]
