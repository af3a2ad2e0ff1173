"""Captured graphs saved in one process and put together again in another."""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda.bindings import driver as real
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldframe.loader.devices.kernel_calls import KernelCalls
from coldframe.loader.errors import DeviceError, DeviceLost, GraphRefused
from coldframe.snapshot.graph_file import decode, encode
from coldframe.snapshot.graph_nodes import relocated
from coldframe.snapshot.graph_reading import GraphReader
from coldframe.snapshot.graph_store import GraphStore
from coldframe.snapshot.graphs import (
    GraphArchive,
    GraphSaver,
    Kernels,
    Rebuilt,
    Region,
    rebuild,
    save,
)
from tests.loader.devices.emulated_graphs import KernelCode
from tests.loader.devices.emulator import Emulator
from tests.snapshot.graph_kit import (
    BARE,
    BASES,
    INDEX,
    KERNELS,
    MIX,
    MOVED,
    TWIN,
    Device,
    capture,
    one_of_each,
    structure,
)

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def device() -> Iterator[Device]:
    """The process that captures."""
    yield from _device(BASES)


@pytest.fixture
def other() -> Iterator[Device]:
    """Another one, whose regions lie elsewhere."""
    yield from _device(MOVED)


def _device(bases: dict[str, int]) -> Iterator[Device]:
    device = Device(bases)
    yield device
    if not device.emulator.is_lost:
        device.close()
        assert device.emulator.left() == []
    device.emulator.close()


def kernels_of(device: Device) -> Kernels:
    """What a process finds out from one kernel that it has captured itself."""
    kernels = Kernels(device.calls)
    kernels.learn(one_of_each(device))
    return kernels


def saved(device: Device, **graphs: Any) -> GraphArchive:
    return save(device.driver, graphs, device.regions, device.fingerprint())


def rebuilt(device: Device, archive: GraphArchive, kernels: Kernels | None = None) -> Rebuilt:
    kernels = kernels_of(device) if kernels is None else kernels
    return rebuild(device.driver, archive, device.regions, kernels)


# -- there and back ------------------------------------------------------------------------------


def test_what_another_process_rebuilds_does_what_was_captured(
    device: Device, tmp_path: Path
) -> None:
    graphs = {"all": capture(device), "one": one_of_each(device)}
    graphs["host"] = device.graph()
    device.emulator.add_other(graphs["host"], "HOST")
    wanted = {}
    for key in ("all", "one"):
        for seed in (3, 4):
            device.fill(seed)
            device.launch(graphs[key])
            wanted[f"{key} {seed}"] = hashlib.sha256(device.content()).hexdigest()
    assert len(set(wanted.values())) == 4
    archive = save(device.driver, graphs, device.regions, device.fingerprint())
    GraphStore(str(tmp_path)).write(archive)
    for where in ("same", "moved"):
        command = [sys.executable, "-m", "tests.snapshot.rebuilt_there", str(tmp_path), where]
        done = subprocess.run(
            [*command, "3", "4"], capture_output=True, text=True, cwd=ROOT, timeout=60
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["found"] == wanted
        assert list(told["refused"]) == ["host"]
        assert told["left"] == []


def test_an_archive_is_the_same_when_it_is_read_again(device: Device) -> None:
    kernels = saved(device, all=capture(device))
    again = decode(encode(kernels), "here", device.fingerprint())
    assert again == kernels
    assert encode(again) == encode(kernels)


def test_no_handle_is_kept(device: Device) -> None:
    """The same capture in two processes is the same archive."""
    first = encode(saved(device, all=capture(device)))
    device.close()
    second = Device(BASES)
    assert encode(saved(second, all=capture(second))) == first
    second.close()
    for region in BASES.items():
        assert region[1].to_bytes(8, "little") not in first


NUMBERS = st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(st.sampled_from([0, 1, 2, 255]), NUMBERS)), NUMBERS)
@settings(max_examples=50)
def test_all_pointers_are_made_at_once(words: list[tuple[int, int]], base: int) -> None:
    bases = {1: base // 3, 2: base // 5, 255: base // 7}
    # What lies in a region cannot be beyond the end of all addresses.
    values = [value % (2**64 - bases.get(kind, 0)) for kind, value in words]
    raw = b"".join(value.to_bytes(8, "little") for value in values)
    kinds = bytes(kind for kind, _ in words)
    expected = [value + bases.get(kind, 0) for value, (kind, _) in zip(values, words, strict=True)]
    made = relocated(raw, kinds, bases)
    got = [int.from_bytes(made[at : at + 8], "little") for at in range(0, len(made), 8)]
    assert got == expected


# -- any graph -----------------------------------------------------------------------------------

_SLOT = 64


@st.composite
def dags(draw: st.DrawFn) -> list[tuple[str, list[int], tuple[int, ...]]]:
    """Nodes with those that each waits for, and numbers of its own."""
    nodes = []
    for number in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["mix", "mix", "index", "twin", "fill", "copy", "empty"]))
        before = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        own = tuple(draw(st.integers(1, 255)) for _ in range(3))
        nodes.append((kind, sorted(before), own))
    return nodes


def build(device: Device, nodes: list[tuple[str, list[int], tuple[int, ...]]]) -> Any:
    """Each node writes a place of its own, and reads one that is done before it."""
    graph, made, calls = device.graph(), [], device.calls
    scratch, weights, context = device.base("scratch"), device.base("weights"), calls.context()
    for number, (kind, before, own) in enumerate(nodes):
        target = scratch + number * _SLOT
        source = scratch + before[0] * _SLOT if before else weights + own[0]
        if kind in ("mix", "twin"):
            code = MIX if kind == "mix" else TWIN
            node = device.kernel(graph, code, (target, source, own[1], _SLOT), shared=own[2])
        elif kind == "index":
            node = device.kernel(graph, INDEX, (structure(target, own[0]),), grid=own)
        elif kind == "fill":
            fill = real.CUDA_MEMSET_NODE_PARAMS()
            fill.dst, fill.value, fill.elementSize = real.CUdeviceptr(target), own[0], 1
            fill.width, fill.height, fill.pitch = 1 + own[1] % _SLOT, 1, 0
            node = calls.add_memset(graph, fill, context)
        elif kind == "copy":
            copy = real.CUDA_MEMCPY3D()
            device_memory = real.CUmemorytype.CU_MEMORYTYPE_DEVICE
            copy.srcMemoryType = copy.dstMemoryType = device_memory
            copy.srcDevice, copy.dstDevice = real.CUdeviceptr(source), real.CUdeviceptr(target)
            copy.WidthInBytes, copy.Height, copy.Depth = 1 + own[1] % _SLOT, 1, 1
            node = calls.add_memcpy(graph, copy, context)
        else:
            node = calls.add_empty(graph)
        for other in before:
            edge = real.CUgraphEdgeData()
            if nodes[other][0] in ("mix", "twin", "index") and own[2] % 2:
                edge.type, edge.from_port = 1, 1  # a programmatic launch
            calls.add_edges(graph, [made[other]], [node], [edge])
        made.append(node)
    return graph


@given(dags(), st.integers(0, 255))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_graph_is_rebuilt_as_it_was(
    nodes: list[tuple[str, list[int], tuple[int, ...]]], seed: int
) -> None:
    device, other = Device(BASES), Device(MOVED)
    graph = build(device, nodes)
    device.fill(seed)
    device.launch(graph)
    archive = decode(encode(saved(device, it=graph)), "here")
    read: list[GraphArchive] = []
    instantiate = other.emulator.cuGraphInstantiate

    def seen(made: Any, flags: int) -> Any:
        read.append(save(other.driver, {"it": made}, other.regions, archive.fingerprint))
        return instantiate(made, flags)

    other.emulator.cuGraphInstantiate = seen
    graphs = rebuilt(other, archive)
    assert graphs.refused == {}
    other.fill(seed)
    other.run(graphs.graphs["it"])
    assert other.content() == device.content()
    # What was put together is what was read, node by node and edge by edge.
    assert read[0].graphs == archive.graphs
    assert read[0].kernels == archive.kernels
    graphs.close()
    for one in (device, other):
        one.close()
        assert one.emulator.left() == []
        one.emulator.close()


def test_attributes_of_nodes_come_along(device: Device, other: Device) -> None:
    names = real.CUkernelNodeAttrID
    given_to = {
        names.CU_LAUNCH_ATTRIBUTE_PRIORITY: (7).to_bytes(4, "little") + bytes(60),
        names.CU_LAUNCH_ATTRIBUTE_COOPERATIVE: (1).to_bytes(4, "little") + bytes(60),
        names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: b"".join(
            size.to_bytes(4, "little") for size in (2, 1, 1)
        )
        + bytes(52),
        names.CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: b"\x19" + bytes(63),
    }
    graph = device.graph()
    plain = device.kernel(graph, BARE, ())
    for node in [device.kernel(graph, BARE, (), grid=(4, 1, 1), before=[plain]) for _ in range(2)]:
        for name, value in given_to.items():
            device.calls.set_node_attribute(node, name, value)
    archive = saved(device, it=graph)
    assert len(archive.attributes) == 2
    found: list[list[dict[int, bytes]]] = []
    instantiate = other.emulator.cuGraphInstantiate

    def seen(made: Any, flags: int) -> Any:
        nodes = other.calls.nodes(made)
        found.append([dict(other.emulator._nodes[int(node)].attributes) for node in nodes])
        return instantiate(made, flags)

    other.emulator.cuGraphInstantiate = seen
    rebuilt(other, archive).close()
    assert found == [[{}, *[{int(name): value for name, value in given_to.items()}] * 2]]


def test_a_kernel_is_given_the_shared_memory_that_it_had(device: Device, other: Device) -> None:
    name = "MAX_DYNAMIC_SHARED_SIZE_BYTES"
    KernelCalls(device.driver).set_attribute(device.functions[BARE.name], name, 96 << 10)
    graph = device.graph()
    device.kernel(graph, BARE, (), shared=90 << 10)
    graphs = rebuilt(other, saved(device, it=graph))
    assert graphs.refused == {}
    assert KernelCalls(other.driver).attribute(other.functions[BARE.name], name) == 96 << 10
    graphs.close()


def test_parameters_that_were_passed_as_one_buffer(device: Device, other: Device) -> None:
    kv = device.base("kv")
    packed = kv.to_bytes(8, "little") * 2 + (9).to_bytes(4, "little") + (64).to_bytes(4, "little")
    held, size = ctypes.create_string_buffer(packed, 24), ctypes.c_size_t(24)
    extra = (ctypes.c_uint64 * 5)(1, ctypes.addressof(held), 2, ctypes.addressof(size), 0)
    graph = device.graph()
    device.kernel(graph, MIX, (kv, kv, 9, 64))
    (node,) = device.calls.nodes(graph)
    told = device.calls.kernel_params(node)
    told.kernelParams, told.extra = 0, ctypes.addressof(extra)
    device.emulator.cuGraphKernelNodeGetParams = lambda node: (real.CUresult.CUDA_SUCCESS, told)
    archive = saved(device, it=graph)
    assert archive.refused == {}
    del device.emulator.cuGraphKernelNodeGetParams
    assert saved(device, it=graph).graphs == archive.graphs
    device.emulator.cuGraphKernelNodeGetParams = lambda node: (real.CUresult.CUDA_SUCCESS, told)
    size.value = 23
    assert "cannot be read" in saved(device, it=graph).refused["it"]


# -- what cannot be kept -------------------------------------------------------------------------

KINDS = {
    "HOST": "calls a function",
    "GRAPH": "a graph of its own",
    "WAIT_EVENT": "waits for an event",
    "EVENT_RECORD": "records an event",
    "EXT_SEMAS_SIGNAL": "signals a semaphore",
    "EXT_SEMAS_WAIT": "waits for a semaphore",
    "MEM_ALLOC": "allocates memory",
    "MEM_FREE": "frees memory",
    "BATCH_MEM_OP": "reads or writes memory",
    "CONDITIONAL": "decides on its own",
    "MEMCPY_BATCH": "of a kind that nobody here knows",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_that_means_nothing_elsewhere_is_refused(device: Device, kind: str) -> None:
    graph, good = device.graph(), one_of_each(device)
    device.kernel(graph, BARE, ())
    device.emulator.add_other(graph, kind)
    archive = saved(device, bad=graph, good=good)
    assert KINDS[kind] in archive.refused["bad"]
    assert f"a {kind} node" in archive.refused["bad"]
    assert list(archive.graphs) == ["good"]


@pytest.mark.parametrize("end", ["src", "dst"])
def test_a_copy_from_or_to_the_host_is_refused(device: Device, end: str) -> None:
    copy, kinds = real.CUDA_MEMCPY3D(), real.CUmemorytype
    copy.srcMemoryType = copy.dstMemoryType = kinds.CU_MEMORYTYPE_DEVICE
    copy.srcDevice = copy.dstDevice = real.CUdeviceptr(device.base("kv"))
    setattr(copy, f"{end}MemoryType", kinds.CU_MEMORYTYPE_HOST)
    copy.WidthInBytes = copy.Height = copy.Depth = 1
    graph = device.graph()
    device.calls.add_memcpy(graph, copy, device.calls.context())
    way = {"src": "from", "dst": "to"}[end]
    refused = saved(device, it=graph).refused["it"]
    assert f"a copy is {way} memory that is not the device's, in a MEMCPY node" in refused
    assert "expected device, got host" in refused


def test_a_pointer_out_of_all_regions_is_refused(device: Device) -> None:
    stray, kv = device.map(0), device.base("kv")
    graphs = {name: device.graph() for name in ("plain", "inside", "number", "fill", "copy")}
    device.kernel(graphs["plain"], MIX, (stray + 8, kv, 1, 8))
    device.kernel(graphs["inside"], INDEX, (structure(stray, 1),))
    device.kernel(graphs["number"], INDEX, (structure(kv, 0x7FFF_1234_5678),))
    fill, copy = real.CUDA_MEMSET_NODE_PARAMS(), real.CUDA_MEMCPY3D()
    fill.dst, fill.elementSize, fill.width, fill.height = real.CUdeviceptr(stray), 1, 1, 1
    device.calls.add_memset(graphs["fill"], fill, device.calls.context())
    copy.srcMemoryType = copy.dstMemoryType = real.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcDevice, copy.dstDevice = real.CUdeviceptr(stray), real.CUdeviceptr(kv)
    copy.WidthInBytes = copy.Height = copy.Depth = 1
    device.calls.add_memcpy(graphs["copy"], copy, device.calls.context())
    archive = saved(device, **graphs)
    assert list(archive.graphs) == ["number"]
    for key, where in (
        ("plain", f"a KERNEL node, kernel {MIX.name}, parameter at 0"),
        ("inside", f"a KERNEL node, kernel {INDEX.name}"),
        ("fill", "a MEMSET node"),
        ("copy", "a MEMCPY node, from"),
    ):
        assert "a pointer leads out of all regions" in archive.refused[key]
        assert where in archive.refused[key]
        assert f"bytes at {stray:#x}" in archive.refused[key]
        assert "before it is captured" in archive.refused[key]


def test_locked_memory_of_the_host_is_no_region(device: Device) -> None:
    page = ctypes.create_string_buffer(4096)
    at = ctypes.addressof(page)
    graph = device.graph()
    device.kernel(graph, MIX, (at, device.base("kv"), 1, 8))
    assert saved(device, it=graph).refused == {}  # a number like any other
    device.driver.register_host(at, 4096)
    assert "out of all regions" in saved(device, it=graph).refused["it"]
    device.driver.unregister_host(at)


def test_two_parameters_side_by_side_are_no_pointer(device: Device, other: Device) -> None:
    """4-byte numbers whose bits are those of an address in a region when read as one."""
    low, high = 0, device.base("kv") >> 32
    graph = device.graph()
    code = KernelCode("_Z4pairii", lambda launch: None, ((0, 4), (4, 4)))
    (function,) = device.emulator.load_module([code])
    device.kernel(graph, code, (low, high), function=function)
    assert set(saved(device, it=graph).graphs["it"].kinds) == {0, 255}


def test_an_address_in_an_attribute_is_refused(device: Device) -> None:
    graph = device.graph()
    node = device.kernel(graph, BARE, ())
    window = real.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_ACCESS_POLICY_WINDOW
    device.calls.set_node_attribute(node, window, b"\x01" * 64)
    refused = saved(device, it=graph).refused["it"]
    assert f"kernel {BARE.name}" in refused
    assert "ACCESS_POLICY_WINDOW" in refused


def test_a_kernel_without_a_name_is_refused(device: Device) -> None:
    graph = device.graph()
    device.kernel(graph, BARE, ())
    device.emulator.fail("cuFuncGetName", code="CUDA_ERROR_INVALID_HANDLE")
    refused = saved(device, it=graph).refused["it"]
    assert "a kernel has no name, in a KERNEL node" in refused
    device.emulator.fail("cuFuncGetParamInfo", code="CUDA_ERROR_NOT_SUPPORTED")
    refused = saved(device, it=graph).refused["it"]
    assert "the driver does not say what a kernel is" in refused
    assert "CUDA_ERROR_NOT_SUPPORTED" in refused


def test_a_librarys_kernel_that_was_launched_as_a_function(device: Device, other: Device) -> None:
    """In a graph a CUkernel may stand in the place of a CUfunction, or in its own."""
    (kernel,) = device.emulator.load_kernels([TWIN])
    graph, kv = device.graph(), device.base("kv")
    device.kernel(graph, TWIN, (kv, kv, 1, 8), function=kernel)
    proper = saved(device, it=graph)
    assert proper.refused == {}
    params = device.calls.kernel_params(device.calls.nodes(graph)[0])
    params.func, params.kern = real.CUfunction(int(kernel)), real.CUkernel(0)
    device.emulator.cuGraphKernelNodeGetParams = lambda node: (real.CUresult.CUDA_SUCCESS, params)
    assert saved(device, it=graph).graphs == proper.graphs
    graphs = rebuilt(other, proper)
    assert graphs.refused == {}
    graphs.close()


def test_the_last_graph_is_kept_where_the_first_was_refused_for_the_driver(device: Device) -> None:
    device.emulator.fail("cuGraphGetNodes", code="CUDA_ERROR_NOT_SUPPORTED")
    archive = saved(device, bad=one_of_each(device), good=one_of_each(device))
    assert "CUDA_ERROR_NOT_SUPPORTED" in archive.refused["bad"]
    assert list(archive.graphs) == ["good"]


def test_a_device_that_is_lost_is_no_reason_of_one_graph(device: Device) -> None:
    saver = GraphSaver(device.driver, device.regions)
    graph = one_of_each(device)
    device.emulator.fail("cuGraphNodeGetType", code="CUDA_ERROR_LAUNCH_FAILED")
    with pytest.raises(DeviceLost):
        saver.add("it", graph)


def test_regions_that_overlap_or_are_too_many(device: Device) -> None:
    with pytest.raises(GraphRefused, match="overlap, in one, two"):
        GraphSaver(device.driver, [Region("two", 15, 10), Region("one", 10, 6)])
    with pytest.raises(GraphRefused, match="too many regions, expected at most 254, got 300"):
        GraphSaver(device.driver, [Region(str(n), n * 10, 10) for n in range(300)])


@pytest.mark.parametrize("call", ["cuFuncGetParamInfo", "cuFuncGetName", "cuGraphGetEdges"])
def test_a_driver_that_is_too_old(call: str) -> None:
    device = Device(BASES, Emulator())
    graph = one_of_each(device)
    archive, kernels = saved(device, it=graph), kernels_of(device)
    device.emulator.missing.add(call)
    with pytest.raises(DeviceError, match=f"expected {call}, got a driver without"):
        saved(device, it=graph)
    with pytest.raises(DeviceError, match=f"expected {call}, got a driver without"):
        rebuilt(device, archive, kernels)
    device.close()
    assert device.emulator.left() == []


# -- what cannot be rebuilt ----------------------------------------------------------------------


def with_kernels(codes: tuple[KernelCode, ...], bases: dict[str, int] = MOVED) -> Device:
    """A process whose module has other kernels, the last of which it has captured itself."""
    device = Device(bases)
    device.functions = dict(
        zip((code.name for code in codes), device.emulator.load_module(codes), strict=True)
    )
    return device


OTHERS = {
    "other layout": (
        KernelCode(MIX.name, MIX.run, ((0, 8), (8, 8), (16, 8), (24, 4)), MIX.attributes),
        "another build: parameters 8 bytes at 0, 8 bytes at 8, 8 bytes at 16, 4 bytes at 24 in",
    ),
    "other registers": (
        KernelCode(MIX.name, MIX.run, MIX.layout, {"NUM_REGS": 40}),
        "another build: NUM_REGS 40 in place of 24",
    ),
    "other architecture": (
        KernelCode(MIX.name, MIX.run, MIX.layout, {**MIX.attributes, "BINARY_VERSION": 80}),
        "another build: BINARY_VERSION 80 in place of 90",
    ),
    "missing": (KernelCode("_Z5other", MIX.run, MIX.layout), "got none of that name"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_build_of_a_kernel_is_not_taken_for_it(device: Device, case: str) -> None:
    code, why = OTHERS[case]
    graph, good, kv = device.graph(), one_of_each(device), device.base("kv")
    device.kernel(graph, MIX, (kv, kv, 1, 8))
    archive = saved(device, bad=graph, good=good)
    other = with_kernels((code, INDEX, TWIN, BARE))
    graphs = rebuilt(other, archive)
    assert list(graphs.graphs) == ["good"]
    assert f"kernel {MIX.name}" in graphs.refused["bad"]
    assert why in graphs.refused["bad"]
    graphs.close()
    other.close()
    assert other.emulator.left() == []


def test_of_several_that_are_alike_the_one_in_the_like_module_is_taken(
    device: Device, other: Device
) -> None:
    ran: list[str] = []

    def noted(name: str) -> KernelCode:
        return KernelCode(BARE.name, lambda launch: ran.append(name), BARE.layout)

    archive = saved(device, it=one_of_each(device))
    (alone,) = other.emulator.load_module([noted("alone")])
    among = other.emulator.load_module([*KERNELS[:-1], noted("among")])
    graph = other.graph()
    other.kernel(graph, BARE, (), function=alone)
    other.kernel(graph, MIX, (0, 0, 0, 0), function=among[0])
    kernels = Kernels(other.calls)
    kernels.learn(graph)
    kernels._list_modules()
    graphs = rebuilt(other, archive, kernels)
    other.run(graphs.graphs["it"])
    assert ran == ["among"]
    graphs.close()


def test_kernels_out_of_an_image_in_the_archive(device: Device, other: Device) -> None:
    graph, kv = device.graph(), device.base("kv")
    code = KernelCode("_Z4ours", MIX.run, MIX.layout)
    device.emulator.images[b"cubin"] = other.emulator.images[b"cubin"] = (code,)
    mine = Kernels(device.calls)
    mine.load(b"cubin")
    function = mine.calls.function_of(mine.calls.kernels(mine._libraries[0])[0])
    device.kernel(graph, code, (kv, kv, 1, 8), function=function)
    archive = save(device.driver, {"it": graph}, device.regions, device.fingerprint(), [b"cubin"])
    kernels = Kernels(other.calls)  # which has captured nothing
    graphs = rebuilt(other, decode(encode(archive), "here"), kernels)
    other.fill(1)
    before = ctypes.string_at(other.base("kv"), 8)
    other.run(graphs.graphs["it"])
    assert ctypes.string_at(other.base("kv"), 8) == bytes((v * 4 + 1) % 256 for v in before)
    graphs.close()
    kernels.close()
    mine.close()


def test_regions_must_be_those_that_it_was_captured_with(device: Device, other: Device) -> None:
    archive = saved(device, it=one_of_each(device))
    with pytest.raises(GraphRefused, match="the memory that graphs use is not what it was"):
        rebuild(other.driver, archive, other.regions[:2], kernels_of(other))


def test_what_may_hide_a_pointer_is_not_moved(device: Device, other: Device) -> None:
    code = KernelCode("_Z3tma", lambda launch: None, ((0, 128), (128, 8)))
    kv = device.base("kv")
    (here,), (there,) = (one.emulator.load_module([code]) for one in (device, other))
    graph, hint = device.graph(), other.graph()
    device.kernel(graph, code, (bytes(128), kv), function=here)
    other.kernel(hint, code, (bytes(128), 0), function=there)
    archive = saved(device, it=graph)
    kernels = kernels_of(other)
    kernels.learn(hint)
    graphs = rebuilt(other, archive, kernels)
    assert (
        "pointers that cannot be told from other numbers, in weights, kv, scr"
        in (graphs.refused["it"])
    )
    mine = kernels_of(device)
    mine.learn(graph)
    graphs = rebuilt(device, archive, mine)
    assert graphs.refused == {}
    graphs.close()


# -- calls that fail on the way ------------------------------------------------------------------

STEPS = {
    "cuCtxGetCurrent": 1,
    "cuStreamCreate": 1,
    "cuModuleEnumerateFunctions": 1,
    "cuFuncLoad": 1,
    "cuFuncGetAttribute": 5,
    "cuFuncSetAttribute": 1,
    "cuGraphCreate": 2,
    "cuGraphAddKernelNode": 4,
    "cuGraphAddMemsetNode": 1,
    "cuGraphAddMemcpyNode": 1,
    "cuGraphAddEmptyNode": 1,
    "cuGraphAddDependencies": 1,
    "cuGraphKernelNodeSetAttribute": 1,
    "cuGraphInstantiate": 2,
    "cuGraphUpload": 2,
    "cuStreamSynchronize": 1,
}


OF_ALL = ("cuCtxGetCurrent", "cuStreamCreate", "cuStreamSynchronize")


@pytest.mark.parametrize("code", ["CUDA_ERROR_NOT_SUPPORTED", "CUDA_ERROR_LAUNCH_FAILED"])
@pytest.mark.parametrize("call", STEPS)
def test_a_call_that_fails_on_the_way_leaves_nothing(
    device: Device, other: Device, call: str, code: str
) -> None:
    name = "MAX_DYNAMIC_SHARED_SIZE_BYTES"
    KernelCalls(device.driver).set_attribute(device.functions[MIX.name], name, 96 << 10)
    graph = capture(device)
    priority = real.CUkernelNodeAttrID.CU_LAUNCH_ATTRIBUTE_PRIORITY
    device.calls.set_node_attribute(
        device.calls.nodes(graph)[0], priority, (5).to_bytes(64, "little")
    )
    archive = saved(device, first=one_of_each(device), it=graph, last=one_of_each(device))
    kernels = kernels_of(other)
    other.emulator.fail(call, STEPS[call], code)
    if code == "CUDA_ERROR_LAUNCH_FAILED":
        with pytest.raises(DeviceLost, match=code):
            rebuilt(other, archive, kernels)
    elif call in OF_ALL:
        with pytest.raises(DeviceError, match=code):
            rebuilt(other, archive, kernels)
    else:
        graphs = rebuilt(other, archive, kernels)
        assert [code in why for why in graphs.refused.values()] == [True]
        assert len(graphs.graphs) == 2
        graphs.close()
    kernels.close()
    assert len(other.emulator.graphs_left()) == 1  # that which it has captured itself
    assert not other.emulator._streams


def test_a_device_that_is_lost_takes_all_with_it(device: Device, other: Device) -> None:
    archive = saved(device, it=capture(device))
    graphs = rebuilt(other, archive)
    other.emulator.lose()
    graphs.close()
    assert graphs.graphs == {}


def test_reading_asks_about_each_kernel_once(device: Device) -> None:
    graph, kv = device.graph(), device.base("kv")
    for number in range(50):
        device.kernel(graph, MIX, (kv, kv, number, 8))
    GraphReader(device.calls, device.regions).read(graph)
    assert device.emulator.calls["cuFuncGetParamInfo"] == len(MIX.layout) + 1
