"""Kernels of captured graphs: what one is known by in another process, and how it is found there.

A handle means nothing elsewhere, and a name alone is not enough: another build of a library has the
same names. So a kernel is known by its name, the layout of its parameters and what the compiler has
made it need (registers, shared memory, the architecture that it is for).

In a new process libraries load their kernels when they are first used, in modules that nobody else
has a handle of. What has been run there leads to them: the kernels of a small graph that the
process has captured itself are taken as they are, and their modules are listed for the names that
are still missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from coldframe.loader.devices.graph_calls import Graph, GraphCalls
from coldframe.loader.devices.kernel_calls import (
    Function,
    KernelCalls,
    LibraryHandle,
    Module,
)
from coldframe.loader.errors import DeviceError, GraphRefused

__all__ = ["KernelIdentity", "Kernels", "function_of", "identify", "settings_of", "settle"]

_NEEDS = (
    "MAX_THREADS_PER_BLOCK",
    "SHARED_SIZE_BYTES",
    "CONST_SIZE_BYTES",
    "LOCAL_SIZE_BYTES",
    "NUM_REGS",
    "PTX_VERSION",
    "BINARY_VERSION",
    "REQUIRED_CLUSTER_WIDTH",
    "REQUIRED_CLUSTER_HEIGHT",
    "REQUIRED_CLUSTER_DEPTH",
)
_SHARED = "MAX_DYNAMIC_SHARED_SIZE_BYTES"
_SETTINGS = (
    _SHARED,
    "PREFERRED_SHARED_MEMORY_CARVEOUT",
    "NON_PORTABLE_CLUSTER_SIZE_ALLOWED",
)
"""What a program may set of a function, and libraries do before they launch it."""

_FIND_IT = "Capture this graph again; a step that is run first loads more kernels."


class KernelIdentity(NamedTuple):
    """What a kernel is known by.

    Attributes:
        name: As the compiler has mangled it.
        owner: How many kernels its module has; 0 where the driver does not say. It decides between
            several that are otherwise alike.
        layout: The offset and size of each parameter, in bytes.
        needs: By the driver's names, what it needs.
    """

    name: str
    owner: int
    layout: tuple[tuple[int, int], ...]
    needs: tuple[tuple[str, int], ...]

    @property
    def block_bytes(self) -> int:
        """What all parameters take, as the device has them."""
        return max((offset + size for offset, size in self.layout), default=0)

    def difference(self, other: KernelIdentity) -> str | None:
        """What another build of the same name has that this one has not, if anything."""
        if self.layout != other.layout:
            return f"parameters {_shown(other.layout)} in place of {_shown(self.layout)}"
        theirs = dict(other.needs)
        for name, value in self.needs:
            if theirs.get(name) != value:
                return f"{name} {theirs.get(name)} in place of {value}"
        return None


def function_of(kernels: KernelCalls, params: Any) -> Function | None:
    """The function that a kernel's node runs, which may be given as a library's kernel.

    Args:
        kernels: The driver's calls.
        params: A CUDA_KERNEL_NODE_PARAMS.

    Returns:
        One that has a name; None where the driver knows none.

    Raises:
        DeviceError: The driver refuses.
    """
    # What the bindings give of a structure is a view of it, and goes with it: handles are copied.
    handle, kernel = int(params.func), int(params.kern)
    if not handle:
        return kernels.function_of(kernels.api.CUkernel(kernel)) if kernel else None
    function: Function = kernels.api.CUfunction(handle)
    if kernels.name(function) is not None:
        return function
    # A library's kernel may be passed for a function when it is launched, and is captured so.
    with suppress(DeviceError):
        return kernels.function_of(kernels.api.CUkernel(handle))
    return None


def identify(kernels: KernelCalls, function: Function, name: str) -> KernelIdentity:
    """What a function is known by.

    Args:
        kernels: The driver's calls.
        function: Which; it must be loaded.
        name: Its own.

    Raises:
        DeviceError: The driver does not say.
    """
    needs = tuple(
        (need, value) for need in _NEEDS if (value := kernels.attribute(function, need)) is not None
    )
    module = kernels.module_of(function)
    owner = 0 if module is None else kernels.function_count(module)
    return KernelIdentity(name, owner, kernels.layout(function), needs)


def settings_of(kernels: KernelCalls, function: Function) -> tuple[tuple[str, int], ...]:
    """What programs have set of a function, by the driver's names."""
    return tuple(
        (name, value)
        for name in _SETTINGS
        if (value := kernels.attribute(function, name)) is not None
    )


def settle(kernels: KernelCalls, function: Function, settings: Iterable[tuple[str, int]]) -> None:
    """Sets what was set of the same function elsewhere; shared memory is never taken away again.

    Raises:
        DeviceError: The driver refuses.
    """
    for name, value in settings:
        now = kernels.attribute(function, name)
        if now is None or now == value or (name == _SHARED and now > value):
            continue
        kernels.set_attribute(function, name, value)


class Kernels:
    """The kernels that this process has, found by what they were known by in another.

    Args:
        graphs: The driver's calls.
    """

    def __init__(self, graphs: GraphCalls) -> None:
        self.calls = KernelCalls(graphs.driver)
        self._graphs = graphs
        self._named: dict[str, dict[int, Function]] = {}
        self._identities: dict[int, KernelIdentity] = {}
        self._unlisted: list[Module] = []
        self._modules: set[int] = set()
        self._found: dict[KernelIdentity, Function] = {}
        self._libraries: list[LibraryHandle] = []

    def learn(self, graph: Graph) -> None:
        """Takes the kernels of a graph that this process has captured.

        Raises:
            DeviceError: It cannot be read.
        """
        seen: set[int] = set()
        for node in self._graphs.nodes(graph):
            if self._graphs.kind(node) != "KERNEL":
                continue
            params = self._graphs.kernel_params(node)
            handle = int(params.func) or int(params.kern)
            if handle in seen:
                continue
            seen.add(handle)
            function = function_of(self.calls, params)
            if function is not None:
                self._add(function)
                self._note(self.calls.module_of(function))

    def load(self, image: bytes) -> None:
        """Takes the kernels of a cubin, a fatbin or PTX, which stays loaded until `close`.

        Raises:
            DeviceError: The driver does not take it.
        """
        library = self.calls.load_library(image)
        self._libraries.append(library)
        for kernel in self.calls.kernels(library):
            self._add(self.calls.function_of(kernel))

    def find(self, wanted: KernelIdentity) -> Function:
        """The function that is known by the same.

        Raises:
            GraphRefused: There is none, or only another build of it.
            DeviceError: The driver refuses to say.
        """
        found = self._found.get(wanted)
        if found is None:
            found = self._match(wanted)
            if found is None:
                self._list_modules()
                found = self._match(wanted)
            if found is None:
                raise self._missing(wanted)
            self._found[wanted] = found
        return found

    def close(self) -> None:
        """Unloads what was loaded here; graphs that use it must be gone."""
        while self._libraries:
            self.calls.unload_library(self._libraries.pop())
        self._found.clear()
        self._named.clear()

    def _match(self, wanted: KernelIdentity) -> Function | None:
        alike = [
            (self._identity(wanted.name, function), function)
            for function in self._named.get(wanted.name, {}).values()
        ]
        fitting = [
            (identity.owner != wanted.owner, function)
            for identity, function in alike
            if wanted.difference(identity) is None
        ]
        return min(fitting, key=lambda pair: pair[0])[1] if fitting else None

    def _identity(self, name: str, function: Function) -> KernelIdentity:
        handle = _number(function)
        known = self._identities.get(handle)
        if known is None:
            self.calls.load(function)
            known = self._identities[handle] = identify(self.calls, function, name)
        return known

    def _add(self, function: Function) -> None:
        name = self.calls.name(function)
        if name is not None:
            handle = _number(function)
            self._named.setdefault(name, {})[handle] = function

    def _note(self, module: Module | None) -> None:
        if module is not None and _number(module) not in self._modules:
            self._modules.add(_number(module))
            self._unlisted.append(module)

    def _list_modules(self) -> None:
        while self._unlisted:
            for function in self.calls.functions(self._unlisted.pop()):
                self._add(function)

    def _missing(self, wanted: KernelIdentity) -> GraphRefused:
        alike = self._named.get(wanted.name, {}).values()
        differences = sorted(
            {
                difference
                for function in alike
                if (difference := wanted.difference(self._identity(wanted.name, function)))
            }
        )
        return GraphRefused(
            "a kernel of the graph is not in this process",
            where=f"kernel {wanted.name}",
            expected="the build that was captured",
            got=f"another build: {'; '.join(differences)}" if differences else "none of that name",
            hint=_FIND_IT,
        )


def _number(handle: Any) -> int:
    """What tells a handle from another, in this process."""
    return int(handle)


def _shown(layout: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{size} bytes at {offset}" for offset, size in layout) or "none"
