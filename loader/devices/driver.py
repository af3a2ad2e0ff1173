"""The CUDA driver, as far as the loader calls it: typed, and with an error of ours for each of its.

What a call means is the driver's own documentation's to say; the names here are ours, the order of
arguments is the driver's. Handles are what the bindings return, and nobody looks into them.
Addresses, sizes and descriptors are plain integers.

Nothing of CUDA is imported before `Driver.open`. Whether a driver has a call is asked (`has`), not
concluded from its version.
"""

from __future__ import annotations

import importlib
from typing import Any, NewType

from coldframe.loader.devices.driver_errors import NO_GPU, kind_of
from coldframe.loader.errors import DeviceError, NoDevice
from coldframe.loader.packages import add_site_packages

__all__ = ["Driver", "Memory", "Stream", "Event", "ContextHandle", "NEEDED"]

Memory = NewType("Memory", object)
"""Physical memory: what can be mapped, and given to other processes."""
Stream = NewType("Stream", object)
Event = NewType("Event", object)
ContextHandle = NewType("ContextHandle", object)

NEEDED = (
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemGetAllocationGranularity",
    "cuMemHostRegister",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMemRelease",
    "cuMemSetAccess",
    "cuMemUnmap",
)
"""Calls that arenas are made with, and that a driver of 2019 lacks."""


class Driver:
    """The calls of one driver.

    Any thread may make them. Those that copy, record or register need a context that is current in
    the calling thread (`make_current`).

    Args:
        api: What has the calls: the module `cuda.bindings.driver`, or what behaves like it.
    """

    def __init__(self, api: Any) -> None:
        self._api = api

    @classmethod
    def open(cls, api: Any = None) -> Driver:
        """The driver of this machine, initialised; that may take a second.

        Args:
            api: See above; None imports the bindings.

        Raises:
            NoDevice: There are no bindings, no driver library, no GPU, or nothing that fits.
            DeviceError: The driver lacks what arenas are made with.
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
        missing = [name for name in NEEDED if not driver.has(name)]
        if missing:
            raise DeviceError(
                "the CUDA driver is too old",
                expected=", ".join(missing),
                got="a driver without",
                hint="Update the driver.",
            )
        return driver

    def has(self, name: str) -> bool:
        """Whether bindings and driver both have a call."""
        if getattr(self._api, name, None) is None:
            return False
        version = self.version()  # a newer one than the driver's own is refused
        flags = self._api.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
        try:
            code, _, status = self._api.cuGetProcAddress(name.encode(), version, flags)
        except RuntimeError:
            return False  # too old to be asked
        found = self._api.CUdriverProcAddressQueryResult.CU_GET_PROC_ADDRESS_SUCCESS
        return bool(code == self._api.CUresult.CUDA_SUCCESS and status == found)

    def version(self) -> int:
        """The CUDA version that the driver is made for: 13020 for 13.2."""
        return int(self._call("the driver's version is unknown", "cuDriverGetVersion"))

    # -- devices ---------------------------------------------------------------------------------

    def device_count(self) -> int:
        return int(self._call("the GPUs cannot be counted", "cuDeviceGetCount"))

    def device_name(self, ordinal: int) -> str:
        """What the maker calls it."""
        name: bytes = self._call(
            "the GPU has no name", "cuDeviceGetName", 256, self._device(ordinal)
        )
        return name.split(b"\0")[0].decode(errors="replace")

    def shares_memory(self, ordinal: int) -> bool:
        """Whether memory of this device can be mapped by other processes, by descriptor."""
        attributes = self._api.CUdevice_attribute
        return all(
            self._call(
                "the GPU does not say what it can do",
                "cuDeviceGetAttribute",
                attribute,
                self._device(ordinal),
            )
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED,
                attributes.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            )
        )

    def _device(self, ordinal: int) -> Any:
        return self._call("there is no such GPU", "cuDeviceGet", ordinal, where=f"cuda:{ordinal}")

    def retain_context(self, ordinal: int) -> ContextHandle:
        """The device's primary context, made where there is none yet."""
        context: ContextHandle = self._call(
            "no context can be made on the GPU",
            "cuDevicePrimaryCtxRetain",
            self._device(ordinal),
            where=f"cuda:{ordinal}",
        )
        return context

    def release_context(self, ordinal: int) -> None:
        device = self._device(ordinal)
        self._call("the context cannot be released", "cuDevicePrimaryCtxRelease", device)

    def make_current(self, context: ContextHandle) -> None:
        """Has the calling thread use a context."""
        self._call("the context cannot be used", "cuCtxSetCurrent", context)

    def memory_info(self) -> tuple[int, int]:
        """Free bytes and all bytes of the current context's device."""
        free, total = self._call("the GPU does not say what memory it has", "cuMemGetInfo")
        return int(free), int(total)

    # -- memory that others can map --------------------------------------------------------------

    def granularity(self, ordinal: int) -> int:
        """What sizes, addresses and offsets of memory must be a multiple of, in bytes."""
        kind = self._api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(
            self._call(
                "the GPU does not say how its memory is cut",
                "cuMemGetAllocationGranularity",
                self._properties(ordinal),
                kind,
                where=f"cuda:{ordinal}",
            )
        )

    def create(self, ordinal: int, nbytes: int, *, shareable: bool = True) -> Memory:
        """Memory that is mapped nowhere yet.

        Args:
            ordinal: The GPU that has it.
            nbytes: How much, in multiples of the granularity.
            shareable: Whether other processes may map it. A process that has such memory mapped
                cannot be frozen.
        """
        memory: Memory = self._call(
            "no memory of the GPU can be had",
            "cuMemCreate",
            nbytes,
            self._properties(ordinal, shareable=shareable),
            0,
            where=f"cuda:{ordinal}",
            expected=f"{nbytes:,} bytes",
        )
        return memory

    def release(self, memory: Memory) -> None:
        """Lets memory go. It stays as long as it is mapped, or somebody has a descriptor of it."""
        self._call("memory of the GPU cannot be released", "cuMemRelease", memory)

    def export(self, memory: Memory) -> int:
        """A descriptor of memory; the caller's to close."""
        return int(
            self._call(
                "memory of the GPU cannot be given to other processes",
                "cuMemExportToShareableHandle",
                memory,
                self._shareable,
                0,
            )
        )

    def import_fd(self, fd: int) -> Memory:
        """The memory behind a descriptor, which stays the caller's."""
        memory: Memory = self._call(
            "the descriptor is not one of a GPU's memory",
            "cuMemImportFromShareableHandle",
            fd,
            self._shareable,
            where=f"descriptor {fd}",
        )
        return memory

    def reserve(self, size: int, alignment: int, address: int) -> int:
        """Addresses with nothing behind them; `address` is only a wish, and 0 is none."""
        return int(
            self._call(
                "the GPU has no addresses left",
                "cuMemAddressReserve",
                size,
                alignment,
                address,
                0,
                where=hex(address) if address else None,
                expected=f"{size:,} bytes",
            )
        )

    def free_addresses(self, address: int, size: int) -> None:
        """Ends a reservation, of which nothing may be mapped any more."""
        self._at("addresses cannot be freed", "cuMemAddressFree", address, size)

    def map(self, address: int, size: int, memory: Memory) -> None:
        """Puts memory behind reserved addresses; nobody may touch it before `set_access`."""
        self._at("memory of the GPU cannot be mapped", "cuMemMap", address, size, 0, memory, 0)

    def unmap(self, address: int, size: int) -> None:
        """Takes memory from behind addresses: a whole mapping, as it was made."""
        self._at("memory of the GPU cannot be unmapped", "cuMemUnmap", address, size)

    def set_access(self, address: int, size: int, ordinal: int, *, writable: bool) -> None:
        """Lets a device reach what is mapped."""
        flags = self._api.CUmemAccess_flags
        access = self._api.CUmemAccessDesc()
        access.location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = ordinal
        access.flags = (
            flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            if writable
            else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        )
        what = "the GPU cannot be let to its memory"
        self._at(what, "cuMemSetAccess", address, size, [access], 1)

    @property
    def _shareable(self) -> Any:
        kinds = self._api.CUmemAllocationHandleType
        return kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _properties(self, ordinal: int, *, shareable: bool = True) -> Any:
        properties = self._api.CUmemAllocationProp()
        properties.type = self._api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        if shareable:
            properties.requestedHandleTypes = self._shareable
        properties.location.type = self._api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = ordinal
        return properties

    # -- host memory, streams, events ------------------------------------------------------------

    def register_host(self, address: int, size: int, *, portable: bool = False) -> None:
        """Locks host memory, so that the device reads it by itself.

        Args:
            address: Where it begins.
            size: Bytes.
            portable: Whether to every context of this process it is locked, not only to this one.
        """
        flags = int(self._api.CU_MEMHOSTREGISTER_PORTABLE) if portable else 0
        self._at("host memory cannot be locked", "cuMemHostRegister", address, size, flags)

    def unregister_host(self, address: int) -> None:
        self._call("host memory cannot be unlocked", "cuMemHostUnregister", address)

    def stream(self) -> Stream:
        """A queue of work that waits for no other."""
        flags = self._api.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream: Stream = self._call("no stream can be made", "cuStreamCreate", flags)
        return stream

    def destroy_stream(self, stream: Stream) -> None:
        self._call("the stream cannot be ended", "cuStreamDestroy", stream)

    def synchronize(self, stream: Stream) -> None:
        """Waits until all work of a stream is done."""
        self._call("work on the GPU failed", "cuStreamSynchronize", stream)

    def event(self) -> Event:
        """A mark in a stream. Who waits for it sleeps rather than spins."""
        flags = self._api.CUevent_flags
        kind = int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING)
        event: Event = self._call("no event can be made", "cuEventCreate", kind)
        return event

    def destroy_event(self, event: Event) -> None:
        self._call("the event cannot be ended", "cuEventDestroy", event)

    def record(self, event: Event, stream: Stream) -> None:
        """Puts the mark behind all that a stream has to do by now."""
        self._call("the event cannot be recorded", "cuEventRecord", event, stream)

    def wait(self, event: Event) -> None:
        """Waits until a stream has come to the mark."""
        self._call("a copy to or from the GPU failed", "cuEventSynchronize", event)

    # -- copies ----------------------------------------------------------------------------------

    def copy_in(self, address: int, host: int, nbytes: int, stream: Stream) -> None:
        """Has bytes copied from the host's memory, which must stay as it is until they are."""
        what = "bytes cannot be copied to the GPU"
        self._call(what, "cuMemcpyHtoDAsync", address, host, nbytes, stream, where=hex(address))

    def copy_rows_in(
        self, address: int, host: int, length: int, count: int, stride: int, stream: Stream
    ) -> None:
        """Has `count` rows of `length` bytes copied, `stride` apart in the host's memory.

        In the device's they lie behind one another.
        """
        kinds = self._api.CUmemorytype
        rows = self._api.CUDA_MEMCPY2D()
        rows.srcMemoryType = kinds.CU_MEMORYTYPE_HOST
        rows.srcHost = host
        rows.srcPitch = stride
        rows.dstMemoryType = kinds.CU_MEMORYTYPE_DEVICE
        rows.dstDevice = address
        rows.dstPitch = length
        rows.WidthInBytes = length
        rows.Height = count
        what = "rows cannot be copied to the GPU"
        self._call(what, "cuMemcpy2DAsync", rows, stream, where=hex(address))

    def copy_out(self, host: int, address: int, nbytes: int, stream: Stream) -> None:
        """Has bytes copied to the host's memory."""
        what = "bytes cannot be copied from the GPU"
        self._call(what, "cuMemcpyDtoHAsync", host, address, nbytes, stream, where=hex(address))

    def copy_across(self, address: int, source: int, nbytes: int, stream: Stream) -> None:
        """Has bytes copied that are on a device already, of this or another that it can reach."""
        what = "bytes cannot be copied from GPU to GPU"
        self._call(what, "cuMemcpyDtoDAsync", address, source, nbytes, stream, where=hex(address))

    def fill_zeros(self, address: int, nbytes: int, stream: Stream) -> None:
        """Has memory of the device filled with zeros."""
        what = "memory of the GPU cannot be zeroed"
        self._call(what, "cuMemsetD8Async", address, 0, nbytes, stream, where=hex(address))

    # -- all of them -----------------------------------------------------------------------------

    @property
    def api(self) -> Any:
        """What has the types that calls take, for those that are typed elsewhere."""
        return self._api

    def call(self, what: str, function: str, *arguments: Any, where: str | None = None) -> Any:
        """Makes a call that is typed elsewhere.

        Args:
            what: What it means where the call fails.
            function: Its name.
            arguments: The driver's own.
            where: What it is about.

        Returns:
            What the call gives beside its code: nothing, a value, or a tuple of several.

        Raises:
            DeviceError: The driver refuses, or has no such call.
        """
        return self._call(what, function, *arguments, where=where)

    def _at(self, what: str, function: str, address: int, size: int, *rest: Any) -> Any:
        where = f"{size:,} bytes at {address:#x}"
        return self._call(what, function, address, size, *rest, where=where)

    def _call(
        self,
        what: str,
        function: str,
        *arguments: Any,
        where: str | None = None,
        expected: str | None = None,
    ) -> Any:
        try:
            code, *values = getattr(self._api, function)(*arguments)
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
            code, *values = getattr(self._api, function)(*arguments)
        except (ValueError, AttributeError, RuntimeError):
            return self._call(what, function, *arguments)  # which says what is wrong
        if code.name in no:
            return None
        self._check(what, function, None, code)
        return None if not values else values[0] if len(values) == 1 else tuple(values)

    def _check(
        self, what: str, function: str, where: str | None, code: Any, expected: str | None = None
    ) -> None:
        if code == self._api.CUresult.CUDA_SUCCESS:
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
        result, text = getattr(self._api, function)(code)
        known = result == self._api.CUresult.CUDA_SUCCESS and text is not None
        return text.decode(errors="replace") if known else f"CUDA error {int(code)}"


def _unknown_code(what: str, function: str, error: ValueError) -> DeviceError:
    """The error for a driver that is newer than its bindings, which have no name for its code."""
    return DeviceError(what, where=function, got=error, hint="Update cuda-bindings.")
