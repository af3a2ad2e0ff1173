"""How calls of the CUDA driver are made: by name, and with an error of ours for each of its.

Which calls there are, and what they mean, others say (`driver`, `graph_calls` and the like).
Nothing of CUDA is imported before `DriverApi.open`. Whether a driver has a call is asked (`has`),
not concluded from its version.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from coldframe.loader.devices.driver_errors import NO_GPU, kind_of
from coldframe.loader.errors import DeviceError, NoDevice
from coldframe.loader.packages import add_site_packages

__all__ = ["DriverApi"]


class DriverApi:
    """Makes calls; any thread may.

    Args:
        api: What has them: the module `cuda.bindings.driver`, or what behaves like it.
    """

    def __init__(self, api: Any) -> None:
        self.api = api

    @classmethod
    def open(cls, api: Any, needed: Sequence[str]) -> DriverApi:
        """The driver of this machine, initialised; that may take a second.

        Args:
            api: See above; None imports the bindings.
            needed: Calls without which it is of no use.

        Raises:
            NoDevice: There are no bindings, no driver library, no GPU, or nothing that fits.
            DeviceError: The driver lacks what is needed.
        """
        if api is None:
            add_site_packages()
            try:
                api = importlib.import_module("cuda.bindings.driver")
            except ImportError as error:
                raise NoDevice(
                    "the bindings to the CUDA driver are not installed",
                    expected="the package cuda-bindings",
                    got=error,
                    hint="Install coldframe[cuda], or take the CPU.",
                ) from error
        driver = cls(api)
        try:
            code, *_ = api.cuInit(0)
        except ValueError as error:
            raise _unknown_code("the CUDA driver does not start", "cuInit", error) from error
        except RuntimeError as error:  # that is how the bindings say that they find no library
            raise NoDevice(
                "there is no CUDA driver on this machine",
                expected="libcuda.so.1",
                got=str(error).splitlines()[0].rstrip("."),
                hint=NO_GPU,
            ) from error
        driver._check("the CUDA driver does not start", "cuInit", None, code)
        missing = [name for name in needed if not driver.has(name)]
        if missing:
            raise DeviceError(
                "the CUDA driver is too old",
                expected=", ".join(missing),
                got="a driver without",
                hint="Update the driver.",
            )
        return driver

    def version(self) -> int:
        """The CUDA version that the driver is made for: 13020 for 13.2."""
        return int(self.call("the driver's version is unknown", "cuDriverGetVersion"))

    def has(self, name: str) -> bool:
        """Whether bindings and driver both have a call."""
        if getattr(self.api, name, None) is None:
            return False
        version = self.version()  # a newer one than the driver's own is refused
        flags = self.api.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
        try:
            code, _, status = self.api.cuGetProcAddress(name.encode(), version, flags)
        except RuntimeError:
            return False  # too old to be asked
        found = self.api.CUdriverProcAddressQueryResult.CU_GET_PROC_ADDRESS_SUCCESS
        return bool(code == self.api.CUresult.CUDA_SUCCESS and status == found)

    def call(
        self,
        what: str,
        function: str,
        *arguments: Any,
        where: str | None = None,
        expected: str | None = None,
    ) -> Any:
        """Makes a call.

        Args:
            what: What it means where the call fails.
            function: Its name.
            arguments: The driver's own.
            where: What it is about.
            expected: What was wanted of it.

        Returns:
            What the call gives beside its code: nothing, a value, or a tuple of several.

        Raises:
            DeviceError: The driver refuses, or has no such call.
        """
        try:
            code, *values = getattr(self.api, function)(*arguments)
        except ValueError as error:
            raise _unknown_code(what, function, error) from error
        except (AttributeError, RuntimeError) as error:  # no such name there, no such symbol here
            raise DeviceError(
                what,
                where=where,
                expected=f"a driver with {function}",
                got=error,
                hint="Update the driver, and cuda-bindings with it.",
            ) from error
        self._check(what, function, where, code, expected)
        return None if not values else values[0] if len(values) == 1 else tuple(values)

    def call_at(self, what: str, function: str, address: int, size: int, *rest: Any) -> Any:
        """A call that is about bytes at an address, which are its first arguments."""
        where = f"{size:,} bytes at {address:#x}"
        return self.call(what, function, address, size, *rest, where=where)

    def ask(self, what: str, function: str, *arguments: Any, no: frozenset[str]) -> Any:
        """Makes a call by one of whose errors the driver only says no.

        Args:
            what: As in `call`; so is the rest.
            no: The names of those errors.

        Returns:
            As `call`, but None for a no.

        Raises:
            DeviceError: It failed in another way, or there is no such call.
        """
        try:
            code, *values = getattr(self.api, function)(*arguments)
        except (ValueError, AttributeError, RuntimeError):
            return self.call(what, function, *arguments)  # which says what is wrong
        if code.name in no:
            return None
        self._check(what, function, None, code)
        return None if not values else values[0] if len(values) == 1 else tuple(values)

    def _check(
        self, what: str, function: str, where: str | None, code: Any, expected: str | None = None
    ) -> None:
        if code == self.api.CUresult.CUDA_SUCCESS:
            return
        name, meaning = self._text("cuGetErrorName", code), self._text("cuGetErrorString", code)
        kind, hint = kind_of(name)
        raise kind(
            what,
            where=f"{function}, {where}" if where else function,
            expected=expected,
            got=f"{name} ({meaning})" if meaning else name,
            hint=hint,
        )

    def _text(self, function: str, code: Any) -> str:
        """What the driver calls an error; its number, where the driver does not know it either."""
        result, text = getattr(self.api, function)(code)
        known = result == self.api.CUresult.CUDA_SUCCESS and text is not None
        return text.decode(errors="replace") if known else f"CUDA error {int(code)}"


def _unknown_code(what: str, function: str, error: ValueError) -> DeviceError:
    """The error for a driver that is newer than its bindings, which have no name for its code."""
    return DeviceError(what, where=function, got=error, hint="Update cuda-bindings.")
