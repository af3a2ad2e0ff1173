"""The kernels that graphs are made of, as the CUDA driver tells of them, and what they are in.

As in `driver.py` names are ours, the order of arguments is the driver's, and an error of ours comes
for each of its. Handles hold in one process only; what a kernel is known by in another its name,
its parameters and what it needs must tell.

All of it needs a context that is current in the calling thread.
"""

from __future__ import annotations

from typing import Any, NewType

from coldframe.loader.devices.driver import Driver

__all__ = ["KernelCalls", "Function", "KernelHandle", "Module", "LibraryHandle", "NAMING"]

Function = NewType("Function", object)
"""A kernel in one context."""
KernelHandle = NewType("KernelHandle", object)
"""A kernel of a library, which all contexts share."""
Module = NewType("Module", object)
LibraryHandle = NewType("LibraryHandle", object)

NAMING = (
    "cuFuncGetAttribute",
    "cuFuncGetModule",
    "cuFuncGetName",
    "cuFuncGetParamInfo",
    "cuFuncLoad",
    "cuFuncSetAttribute",
    "cuKernelGetFunction",
    "cuModuleEnumerateFunctions",
    "cuModuleGetFunctionCount",
)
"""Calls without which a kernel cannot be told from another; the youngest are of CUDA 12.4."""

_NO_SUCH = frozenset({"CUDA_ERROR_INVALID_VALUE"})
_NO_FUNCTION = frozenset({"CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_INVALID_HANDLE"})
_NOT_THERE = frozenset({"CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_NOT_FOUND"})


class KernelCalls:
    """The calls of one driver that are about kernels.

    Args:
        driver: Whose.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.api = driver.api
        self._call = driver.call

    def name(self, function: Function) -> str | None:
        """A function's name, as the compiler has mangled it; None where this is no function."""
        what = "a kernel has no name"
        found = self.driver.ask(what, "cuFuncGetName", function, no=_NO_FUNCTION)
        return None if found is None else bytes(found).decode()

    def kernel_name(self, kernel: KernelHandle) -> str:
        """A library kernel's name."""
        return bytes(self._call("a kernel has no name", "cuKernelGetName", kernel)).decode()

    def layout(self, function: Function) -> tuple[tuple[int, int], ...]:
        """The offset and size in bytes of each of a function's parameters."""
        what = "the parameters of a kernel are unknown"
        found: list[tuple[int, int]] = []
        while True:
            number = len(found)
            got = self.driver.ask(what, "cuFuncGetParamInfo", function, number, no=_NO_SUCH)
            if got is None:
                return tuple(found)
            found.append((int(got[0]), int(got[1])))

    def kernel_layout(self, kernel: KernelHandle) -> tuple[tuple[int, int], ...]:
        """The same of a library's kernel."""
        what = "the parameters of a kernel are unknown"
        found: list[tuple[int, int]] = []
        while True:
            number = len(found)
            got = self.driver.ask(what, "cuKernelGetParamInfo", kernel, number, no=_NO_SUCH)
            if got is None:
                return tuple(found)
            found.append((int(got[0]), int(got[1])))

    def load(self, function: Function) -> None:
        """Has a function loaded that was only listed; before that it does not say what it needs."""
        self._call("a kernel cannot be loaded", "cuFuncLoad", function)

    def attribute(self, function: Function, name: str) -> int | None:
        """A number that a function has, by the driver's name; None where it knows none such.

        Args:
            function: Which.
            name: Such as `NUM_REGS`.
        """
        attribute = self._function_attribute(name)
        if attribute is None:
            return None
        what = "a kernel does not say what it needs"
        found = self.driver.ask(what, "cuFuncGetAttribute", attribute, function, no=_NO_SUCH)
        return None if found is None else int(found)

    def set_attribute(self, function: Function, name: str, value: int) -> None:
        """Sets a number of a function, such as `MAX_DYNAMIC_SHARED_SIZE_BYTES`."""
        what = "a kernel cannot be given what it needs"
        attribute = self._function_attribute(name)
        self._call(what, "cuFuncSetAttribute", function, attribute, value, where=name)

    def _function_attribute(self, name: str) -> Any:
        return getattr(self.api.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}", None)

    def module_of(self, function: Function) -> Module | None:
        """The module that a function is in; None where the driver does not say."""
        what = "a kernel is in no module"
        module: Module | None = self.driver.ask(what, "cuFuncGetModule", function, no=_NOT_THERE)
        return module

    def library_of(self, kernel: KernelHandle) -> LibraryHandle:
        """The library that a kernel is in."""
        library: LibraryHandle = self._call(
            "a kernel is in no library", "cuKernelGetLibrary", kernel
        )
        return library

    def function_count(self, module: Module) -> int:
        """How many functions a module has."""
        what = "the kernels of a module cannot be counted"
        return int(self._call(what, "cuModuleGetFunctionCount", module))

    def functions(self, module: Module) -> list[Function]:
        """All functions of a module."""
        what, count = "the kernels of a module cannot be listed", self.function_count(module)
        return list(self._call(what, "cuModuleEnumerateFunctions", count, module)) if count else []

    def kernels(self, library: LibraryHandle) -> list[KernelHandle]:
        """All kernels of a library."""
        what = "the kernels of a library cannot be listed"
        count = int(self._call(what, "cuLibraryGetKernelCount", library))
        return list(self._call(what, "cuLibraryEnumerateKernels", count, library)) if count else []

    def function_of(self, kernel: KernelHandle) -> Function:
        """A library's kernel in the current context."""
        function: Function = self._call(
            "a kernel cannot be had in this context", "cuKernelGetFunction", kernel
        )
        return function

    def load_library(self, image: bytes) -> LibraryHandle:
        """A library from a cubin, a fatbin or PTX."""
        library: LibraryHandle = self._call(
            "a library of kernels cannot be loaded",
            "cuLibraryLoadData",
            image,
            [],
            [],
            0,
            [],
            [],
            0,
            where=f"an image of {len(image):,} bytes",
        )
        return library

    def unload_library(self, library: LibraryHandle) -> None:
        """Lets a library go; nothing of it may be in use any more."""
        self._call("a library of kernels cannot be unloaded", "cuLibraryUnload", library)

    def library_kernel(self, library: LibraryHandle, name: str) -> KernelHandle:
        """A library's kernel by its name."""
        what = "a library has no such kernel"
        kernel: KernelHandle = self._call(
            what, "cuLibraryGetKernel", library, name.encode(), where=name
        )
        return kernel
