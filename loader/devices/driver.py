"""The CUDA driver, as far as the loader calls it: typed, and with an error of ours for each of its.

What a call means is the driver's own documentation's to say; the names here are ours, the order of
arguments is the driver's. Handles are what the bindings return, and nobody looks into them.
Addresses, sizes and descriptors are plain integers.

Nothing of CUDA is imported before `Driver.open`. Whether a driver has a call is asked (`has`), not
concluded from its version.
"""

from __future__ import annotations

from typing import Any, NewType

from coldframe.loader.devices.driver_api import DriverApi

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

    Attributes:
        api: The same, for those whose calls are typed elsewhere: it has the types that they take.
        call: Makes such a call; see `DriverApi.call`.
        ask: Likewise, where the driver may say no; see `DriverApi.ask`.
        has: Whether bindings and driver both have a call.
        version: Says which CUDA version the driver is made for: 13020 for 13.2.
    """

    def __init__(self, api: Any) -> None:
        calls = DriverApi(api)
        self.api = calls.api
        self.call = calls.call
        self.ask = calls.ask
        self.has = calls.has
        self.version = calls.version
        self._at = calls.call_at

    @classmethod
    def open(cls, api: Any = None) -> Driver:
        """The driver of this machine, initialised; that may take a second.

        Args:
            api: See above; None imports the bindings.

        Raises:
            NoDevice: There are no bindings, no driver library, no GPU, or nothing that fits.
            DeviceError: The driver lacks what arenas are made with.
        """
        return cls(DriverApi.open(api, NEEDED).api)

    # -- devices ---------------------------------------------------------------------------------

    def device_count(self) -> int:
        return int(self.call("the GPUs cannot be counted", "cuDeviceGetCount"))

    def device_name(self, ordinal: int) -> str:
        """What the maker calls it."""
        name: bytes = self.call(
            "the GPU has no name", "cuDeviceGetName", 256, self._device(ordinal)
        )
        return name.split(b"\0")[0].decode(errors="replace")

    def shares_memory(self, ordinal: int) -> bool:
        """Whether memory of this device can be mapped by other processes, by descriptor."""
        attributes = self.api.CUdevice_attribute
        return all(
            self.call(
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
        return self.call("there is no such GPU", "cuDeviceGet", ordinal, where=f"cuda:{ordinal}")

    def retain_context(self, ordinal: int) -> ContextHandle:
        """The device's primary context, made where there is none yet."""
        context: ContextHandle = self.call(
            "no context can be made on the GPU",
            "cuDevicePrimaryCtxRetain",
            self._device(ordinal),
            where=f"cuda:{ordinal}",
        )
        return context

    def release_context(self, ordinal: int) -> None:
        device = self._device(ordinal)
        self.call("the context cannot be released", "cuDevicePrimaryCtxRelease", device)

    def make_current(self, context: ContextHandle) -> None:
        """Has the calling thread use a context."""
        self.call("the context cannot be used", "cuCtxSetCurrent", context)

    def memory_info(self) -> tuple[int, int]:
        """Free bytes and all bytes of the current context's device."""
        free, total = self.call("the GPU does not say what memory it has", "cuMemGetInfo")
        return int(free), int(total)

    # -- memory that others can map --------------------------------------------------------------

    def granularity(self, ordinal: int) -> int:
        """What sizes, addresses and offsets of memory must be a multiple of, in bytes."""
        kind = self.api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        return int(
            self.call(
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
        memory: Memory = self.call(
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
        self.call("memory of the GPU cannot be released", "cuMemRelease", memory)

    def export(self, memory: Memory) -> int:
        """A descriptor of memory; the caller's to close."""
        return int(
            self.call(
                "memory of the GPU cannot be given to other processes",
                "cuMemExportToShareableHandle",
                memory,
                self._shareable,
                0,
            )
        )

    def import_fd(self, fd: int) -> Memory:
        """The memory behind a descriptor, which stays the caller's."""
        memory: Memory = self.call(
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
            self.call(
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
        flags = self.api.CUmemAccess_flags
        access = self.api.CUmemAccessDesc()
        access.location.type = self.api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
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
        kinds = self.api.CUmemAllocationHandleType
        return kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    def _properties(self, ordinal: int, *, shareable: bool = True) -> Any:
        properties = self.api.CUmemAllocationProp()
        properties.type = self.api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        if shareable:
            properties.requestedHandleTypes = self._shareable
        properties.location.type = self.api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
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
        flags = int(self.api.CU_MEMHOSTREGISTER_PORTABLE) if portable else 0
        self._at("host memory cannot be locked", "cuMemHostRegister", address, size, flags)

    def unregister_host(self, address: int) -> None:
        self.call("host memory cannot be unlocked", "cuMemHostUnregister", address)

    def stream(self) -> Stream:
        """A queue of work that waits for no other."""
        flags = self.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        stream: Stream = self.call("no stream can be made", "cuStreamCreate", flags)
        return stream

    def destroy_stream(self, stream: Stream) -> None:
        self.call("the stream cannot be ended", "cuStreamDestroy", stream)

    def synchronize(self, stream: Stream) -> None:
        """Waits until all work of a stream is done."""
        self.call("work on the GPU failed", "cuStreamSynchronize", stream)

    def event(self) -> Event:
        """A mark in a stream. Who waits for it sleeps rather than spins."""
        flags = self.api.CUevent_flags
        kind = int(flags.CU_EVENT_BLOCKING_SYNC) | int(flags.CU_EVENT_DISABLE_TIMING)
        event: Event = self.call("no event can be made", "cuEventCreate", kind)
        return event

    def destroy_event(self, event: Event) -> None:
        self.call("the event cannot be ended", "cuEventDestroy", event)

    def record(self, event: Event, stream: Stream) -> None:
        """Puts the mark behind all that a stream has to do by now."""
        self.call("the event cannot be recorded", "cuEventRecord", event, stream)

    def wait(self, event: Event) -> None:
        """Waits until a stream has come to the mark."""
        self.call("a copy to or from the GPU failed", "cuEventSynchronize", event)

    # -- copies ----------------------------------------------------------------------------------

    def copy_in(self, address: int, host: int, nbytes: int, stream: Stream) -> None:
        """Has bytes copied from the host's memory, which must stay as it is until they are."""
        what = "bytes cannot be copied to the GPU"
        self.call(what, "cuMemcpyHtoDAsync", address, host, nbytes, stream, where=hex(address))

    def copy_rows_in(
        self, address: int, host: int, length: int, count: int, stride: int, stream: Stream
    ) -> None:
        """Has `count` rows of `length` bytes copied, `stride` apart in the host's memory.

        In the device's they lie behind one another.
        """
        kinds = self.api.CUmemorytype
        rows = self.api.CUDA_MEMCPY2D()
        rows.srcMemoryType = kinds.CU_MEMORYTYPE_HOST
        rows.srcHost = host
        rows.srcPitch = stride
        rows.dstMemoryType = kinds.CU_MEMORYTYPE_DEVICE
        rows.dstDevice = address
        rows.dstPitch = length
        rows.WidthInBytes = length
        rows.Height = count
        what = "rows cannot be copied to the GPU"
        self.call(what, "cuMemcpy2DAsync", rows, stream, where=hex(address))

    def copy_out(self, host: int, address: int, nbytes: int, stream: Stream) -> None:
        """Has bytes copied to the host's memory."""
        what = "bytes cannot be copied from the GPU"
        self.call(what, "cuMemcpyDtoHAsync", host, address, nbytes, stream, where=hex(address))

    def copy_across(self, address: int, source: int, nbytes: int, stream: Stream) -> None:
        """Has bytes copied that are on a device already, of this or another that it can reach."""
        what = "bytes cannot be copied from GPU to GPU"
        self.call(what, "cuMemcpyDtoDAsync", address, source, nbytes, stream, where=hex(address))

    def fill_zeros(self, address: int, nbytes: int, stream: Stream) -> None:
        """Has memory of the device filled with zeros."""
        what = "memory of the GPU cannot be zeroed"
        self.call(what, "cuMemsetD8Async", address, 0, nbytes, stream, where=hex(address))
