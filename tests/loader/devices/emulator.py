"""An emulator of the CUDA driver calls that the loader makes: it proves protocol, not speed.

It stands in the place of `cuda.bindings.driver`, with the same signatures, types and enumerations
(a test compares them), and is strict where the driver may forgive: what its documentation forbids
or leaves undefined is an error here.

- Memory is a memfd, and a device's address a real one of this process, so that memory exported here
  can be imported in another process and tests can read what lies where.
- Copies are done by a thread for each stream, late: neither is a byte taken from locked host memory
  before the copy's turn, nor is one at its place before. `hold` stops them for as long as a test
  wants. What is unmapped or unlocked by then is the loss of the device, as on a real one.
- `fail` makes the n-th call of a kind fail, `fail_copy` the n-th copy, `lose` the device; `missing`
  names calls that the driver lacks, and `library` is whether there is a driver at all.
- Graphs and kernels are in `emulated_graphs.py`.

Other processes' memory is not counted, nor is there more than the little of contexts that is used.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver as real

from tests.loader.devices.emulated_graphs import VALUES, EmulatedGraphs
from tests.loader.devices.refusal import Refused
from tests.loader.devices.refusal import require as _require

GRANULARITY = 2 << 20
MEMFD = "emulated-vram"
LOST = "CUDA_ERROR_ECC_UNCORRECTABLE"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_NONE, _READ, _WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_FIXED, _FIXED_NOREPLACE, _NORESERVE = 0x10, 0x100000, 0x4000
_EMPTY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE


@dataclass
class _Allocation:
    fd: int
    size: int
    inode: int
    device: int
    handles: int = 1
    mappings: int = 0
    shareable: bool = True


@dataclass
class _Mapping:
    size: int
    allocation: _Allocation
    protection: int = _NONE


@dataclass
class _Mark:
    """One recording of an event."""

    passed: threading.Event = field(default_factory=threading.Event)


class Emulator(EmulatedGraphs):
    """A driver with its devices.

    Args:
        memory: Bytes of each device.
        devices: How many.
        library: Whether there is a driver.
        missing: Calls that the driver is too old for.
        delay: Seconds that each copy waits for its turn.
        can_share: Whether memory can be given to other processes.
        can_protect: Whether memory can be mapped for reading only.
        can_reach: Whether the devices can reach each other's memory.
    """

    def __init__(
        self,
        memory: int = 1 << 30,
        *,
        devices: int = 1,
        library: bool = True,
        missing: Iterable[str] = (),
        delay: float = 0.0,
        can_share: bool = True,
        can_protect: bool = True,
        can_reach: bool = True,
    ) -> None:
        super().__init__()
        self.memory = memory
        self.devices = devices
        self.library = library
        self.missing = set(missing)
        self.delay = delay
        self.can_share = can_share
        self.can_protect = can_protect
        self.can_reach = can_reach
        self.calls: dict[str, int] = defaultdict(int)
        self.copied = 0
        self.most_locked = 0
        self._lock = threading.RLock()
        self._initialised = False
        self._lost: str | None = None
        self._failures: dict[str, tuple[int, str]] = {}
        self._failing_copy: tuple[int, str] | None = None
        self._contexts: dict[int, int] = defaultdict(int)
        self._current = threading.local()
        self._numbers = iter(range(0x1000, 1 << 60))
        self._handles: dict[int, _Allocation] = {}
        self._shared: dict[int, _Allocation] = {}
        self._reserved: dict[int, int] = {}
        self._mapped: dict[int, _Mapping] = {}
        self._registered: dict[int, int] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Mark | None] = {}
        self.go = threading.Event()
        self.go.set()

    def __getattr__(self, name: str) -> Any:
        # Types and enumerations are the bindings' own; a call that is not emulated is a mistake.
        if name.startswith("CU"):
            return getattr(real, name)
        raise AttributeError(name)

    # -- what tests do ---------------------------------------------------------------------------

    def fail(self, call: str, nth: int = 1, code: str = "CUDA_ERROR_INVALID_VALUE") -> None:
        """The n-th call of that name from now on fails."""
        with self._lock:
            self._failures[call] = (self.calls[call] + nth, code)

    def fail_copy(self, nth: int = 1, code: str = "CUDA_ERROR_ILLEGAL_ADDRESS") -> None:
        """The n-th copy from now on fails when its turn has come, and the device is lost."""
        with self._lock:
            self._failing_copy = (self.copied + nth, code)

    def lose(self, code: str = LOST) -> None:
        """The device falls off the bus: nothing works any more."""
        with self._lock:
            self._lost = self._lost or code
        self.go.set()

    def hold(self) -> None:
        """Copies wait until `go` is set."""
        self.go.clear()

    @property
    def is_lost(self) -> bool:
        return self._lost is not None

    def left(self) -> list[str]:
        """What was made and not given back."""
        with self._lock:
            return [
                *(f"handle {number:#x}" for number in self._handles),
                *(f"mapping at {address:#x}" for address in self._mapped),
                *(f"reservation at {address:#x}" for address in self._reserved),
                *(f"locked memory at {address:#x}" for address in self._registered),
                *(f"stream {number:#x}" for number in self._streams),
                *(f"event {number:#x}" for number in self._events),
                *self.graphs_left(),
                *(f"context of {n}" for n, count in self._contexts.items() if count),
                *(f"descriptor of inode {inode}" for inode in self._shared if _is_open(inode)),
            ]

    def close(self) -> None:
        """Gives back what nobody could, as on a device that was lost."""
        self.go.set()
        for stream in list(self._streams.values()):
            stream.end()
        self._streams.clear()
        for address, size in self._reserved.items():
            _libc.munmap(address, size)
        held = [*self._handles.values(), *(m.allocation for m in self._mapped.values())]
        for fd in {allocation.fd for allocation in held}:
            os.close(fd)
        for what in (self._reserved, self._handles, self._mapped):
            what.clear()

    @property
    def used(self) -> int:
        """Bytes of all devices' memory that are held in this process."""
        return sum(self.used_of(device) for device in range(self.devices))

    def used_of(self, device: int) -> int:
        with self._lock:
            self._shared = {inode: a for inode, a in self._shared.items() if _is_open(inode)}
            mapped = [mapping.allocation for mapping in self._mapped.values()]
            held = [*self._handles.values(), *mapped, *self._shared.values()]
            # The same memory may have been imported several times.
            sizes = {a.inode: a.size for a in held if a.device == device}
            return sum(sizes.values())

    # -- start, errors, devices, contexts --------------------------------------------------------

    def cuInit(self, Flags):
        def call() -> None:
            _require(Flags == 0)
            if not self.devices:
                raise Refused("CUDA_ERROR_NO_DEVICE")
            self._initialised = True

        return self._do("cuInit", call, before_init=True)

    def cuDriverGetVersion(self):
        return self._do("cuDriverGetVersion", lambda: 13000, before_init=True)

    def cuGetProcAddress(self, symbol, cudaVersion, flags):
        status = real.CUdriverProcAddressQueryResult

        def call() -> tuple[int, Any]:
            _require(isinstance(symbol, bytes) and 0 < cudaVersion <= 13000)
            if symbol.decode() in self.missing or not hasattr(self, symbol.decode()):
                return 0, status.CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND
            return 1, status.CU_GET_PROC_ADDRESS_SUCCESS

        return self._do("cuGetProcAddress", call)

    def cuGetErrorName(self, error):
        return real.CUresult.CUDA_SUCCESS, real.CUresult(error).name.encode()

    def cuGetErrorString(self, error):
        words = real.CUresult(error).name.removeprefix("CUDA_ERROR_").lower().replace("_", " ")
        return real.CUresult.CUDA_SUCCESS, words.encode()

    def cuDeviceGetCount(self):
        return self._do("cuDeviceGetCount", lambda: self.devices)

    def cuDeviceGet(self, ordinal):
        def call() -> Any:
            if not 0 <= ordinal < self.devices:
                raise Refused("CUDA_ERROR_INVALID_DEVICE")
            return real.CUdevice(ordinal)

        return self._do("cuDeviceGet", call)

    def cuDeviceGetName(self, length, dev):
        name = f"Emulated GPU {int(dev)}".encode()[:length]
        return self._do("cuDeviceGetName", lambda: name)

    def cuDeviceGetAttribute(self, attrib, dev):
        kinds = real.CUdevice_attribute
        capability = {
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 0,
        }
        value = capability.get(attrib, int(self.can_share))
        return self._do("cuDeviceGetAttribute", lambda: value)

    def cuDevicePrimaryCtxRetain(self, dev):
        def call() -> Any:
            self._contexts[int(dev)] += 1
            return real.CUcontext(0x100 + int(dev))

        return self._do("cuDevicePrimaryCtxRetain", call)

    def cuDevicePrimaryCtxRelease(self, dev):
        def call() -> None:
            if not self._contexts[int(dev)]:
                raise Refused("CUDA_ERROR_INVALID_CONTEXT")
            self._contexts[int(dev)] -= 1

        return self._do("cuDevicePrimaryCtxRelease", call)

    def cuCtxSetCurrent(self, ctx):
        def call() -> None:
            if not self._contexts[int(ctx) - 0x100]:
                raise Refused("CUDA_ERROR_INVALID_CONTEXT")
            self._current.device = int(ctx) - 0x100

        return self._do("cuCtxSetCurrent", call)

    def cuMemGetInfo(self):
        def call() -> tuple[int, int]:
            return max(0, self.memory - self.used_of(self._current.device)), self.memory

        return self._do("cuMemGetInfo", call, in_context=True)

    # -- memory ----------------------------------------------------------------------------------

    def cuMemGetAllocationGranularity(self, prop, option):
        def call() -> int:
            self._check_properties(prop)
            real.CUmemAllocationGranularity_flags(option)
            return GRANULARITY

        return self._do("cuMemGetAllocationGranularity", call)

    def _check_properties(self, prop: Any) -> None:
        _require(prop.type == real.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED)
        _require(prop.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
        if not 0 <= prop.location.id < self.devices:
            raise Refused("CUDA_ERROR_INVALID_DEVICE")

    def cuMemCreate(self, size, prop, flags):
        def call() -> Any:
            self._check_properties(prop)
            _require(flags == 0 and size > 0 and size % GRANULARITY == 0)
            kinds = real.CUmemAllocationHandleType
            posix = kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            shareable = prop.requestedHandleTypes == posix
            _require(shareable or prop.requestedHandleTypes == kinds.CU_MEM_HANDLE_TYPE_NONE)
            device = prop.location.id
            if self.used_of(device) + size > self.memory:
                raise Refused("CUDA_ERROR_OUT_OF_MEMORY")
            fd = os.memfd_create(f"{MEMFD}-{device}", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            for at in range(0, size, GRANULARITY):
                os.pwrite(fd, b"what was here before", at)
            inode = os.fstat(fd).st_ino
            return self._new_handle(_Allocation(fd, size, inode, device, shareable=shareable))

        return self._do("cuMemCreate", call)

    def _new_handle(self, allocation: _Allocation) -> Any:
        number = next(self._numbers)
        self._handles[number] = allocation
        return real.CUmemGenericAllocationHandle(number)

    def cuMemRelease(self, handle):
        def call() -> None:
            allocation = self._handles.pop(int(handle), None)
            _require(allocation is not None)
            allocation.handles -= 1
            self._maybe_free(allocation)

        return self._do("cuMemRelease", call)

    def _maybe_free(self, allocation: _Allocation) -> None:
        if not allocation.handles and not allocation.mappings:
            os.close(allocation.fd)

    def cuMemExportToShareableHandle(self, handle, handleType, flags):
        def call() -> int:
            posix = real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            _require(handleType == posix and flags == 0 and int(handle) in self._handles)
            allocation = self._handles[int(handle)]
            _require(allocation.shareable)
            self._shared[allocation.inode] = allocation
            return os.dup(allocation.fd)

        return self._do("cuMemExportToShareableHandle", call)

    def cuMemImportFromShareableHandle(self, osHandle, shHandleType):
        def call() -> Any:
            posix = real.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            _require(shHandleType == posix)
            try:
                target = os.readlink(f"/proc/self/fd/{osHandle}")
                _require(target.startswith(f"/memfd:{MEMFD}-"))
                fd, status = os.dup(osHandle), os.fstat(osHandle)
            except OSError as error:
                raise Refused("CUDA_ERROR_INVALID_VALUE") from error
            device = int(target.split()[0].rpartition("-")[2])
            return self._new_handle(_Allocation(fd, status.st_size, status.st_ino, device))

        return self._do("cuMemImportFromShareableHandle", call)

    def cuMemAddressReserve(self, size, alignment, addr, flags):
        def call() -> Any:
            wish = int(addr)
            _require(size > 0 and size % mmap.PAGESIZE == 0 and wish % mmap.PAGESIZE == 0)
            _require(alignment & (alignment - 1) == 0 and flags == 0)
            address = None
            if wish and wish % max(alignment, 1) == 0:
                address = _mmap(wish, size, _NONE, _EMPTY | _FIXED_NOREPLACE)
            if address is None:
                # No better than what was asked for.
                address = _mmap_aligned(size, alignment or mmap.PAGESIZE)
            if address is None:
                raise Refused("CUDA_ERROR_OUT_OF_MEMORY")
            self._reserved[address] = size
            return real.CUdeviceptr(address)

        return self._do("cuMemAddressReserve", call)

    def cuMemAddressFree(self, ptr, size):
        def call() -> None:
            address = int(ptr)
            _require(self._reserved.get(address) == size)
            _require(not self._overlaps(address, size))
            del self._reserved[address]
            _libc.munmap(address, size)

        return self._do("cuMemAddressFree", call)

    def cuMemMap(self, ptr, size, offset, handle, flags):
        def call() -> None:
            address = int(ptr)
            _require(flags == 0 and size > 0 and int(handle) in self._handles)
            _require(not any(value % GRANULARITY for value in (address, size, offset)))
            allocation = self._handles[int(handle)]
            _require(offset + size <= allocation.size)
            _require(
                any(
                    base <= address and address + size <= base + span
                    for base, span in self._reserved.items()
                )
            )
            _require(not self._overlaps(address, size))
            done = _mmap(address, size, _NONE, mmap.MAP_SHARED | _FIXED, allocation.fd, offset)
            _require(done == address)
            allocation.mappings += 1
            self._mapped[address] = _Mapping(size, allocation)

        return self._do("cuMemMap", call)

    def _overlaps(self, address: int, size: int) -> bool:
        return any(
            base < address + size and address < base + mapping.size
            for base, mapping in self._mapped.items()
        )

    def _whole(self, address: int, size: int) -> list[int]:
        """The mappings that a range consists of, which must be some as a whole."""
        found, at = [], address
        while at < address + size:
            _require(at in self._mapped)
            found.append(at)
            at += self._mapped[at].size
        _require(at == address + size and bool(found))
        return found

    def cuMemUnmap(self, ptr, size):
        def call() -> None:
            for address in self._whole(int(ptr), size):
                mapping = self._mapped.pop(address)
                _mmap(address, mapping.size, _NONE, _EMPTY | _FIXED)
                mapping.allocation.mappings -= 1
                self._maybe_free(mapping.allocation)

        return self._do("cuMemUnmap", call)

    def cuMemSetAccess(self, ptr, size, desc, count):
        def call() -> None:
            _require(len(desc) == count == 1)
            (access,) = desc
            _require(access.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE)
            if not 0 <= access.location.id < self.devices:
                raise Refused("CUDA_ERROR_INVALID_DEVICE")
            flags = real.CUmemAccess_flags
            if access.flags == flags.CU_MEM_ACCESS_FLAGS_PROT_READ and not self.can_protect:
                raise Refused("CUDA_ERROR_NOT_SUPPORTED")
            protection = {
                flags.CU_MEM_ACCESS_FLAGS_PROT_NONE: _NONE,
                flags.CU_MEM_ACCESS_FLAGS_PROT_READ: _READ,
                flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE: _WRITE,
            }[access.flags]
            for address in self._whole(int(ptr), size):
                # A GPU's own memory, or that of a peer.
                own = self._mapped[address].allocation.device == access.location.id
                if not (own or self.can_reach):
                    raise Refused("CUDA_ERROR_INVALID_DEVICE")
                _libc.mprotect(address, self._mapped[address].size, protection)
                self._mapped[address].protection = protection

        return self._do("cuMemSetAccess", call)

    # -- host memory, streams, events ------------------------------------------------------------

    def cuMemHostRegister(self, p, bytesize, Flags):
        def call() -> None:
            _require(p > 0 and bytesize > 0)
            _require(Flags in (0, real.CU_MEMHOSTREGISTER_PORTABLE))
            for address, size in self._registered.items():
                if address < p + bytesize and p < address + size:
                    raise Refused("CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED")
            self._registered[p] = bytesize
            self.most_locked = max(self.most_locked, sum(self._registered.values()))

        return self._do("cuMemHostRegister", call, in_context=True)

    def cuMemHostUnregister(self, p):
        def call() -> None:
            if self._registered.pop(p, None) is None:
                raise Refused("CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED")

        return self._do("cuMemHostUnregister", call, in_context=True)

    def is_locked(self, host: int, size: int) -> bool:
        """All of it, in one stretch; to a copy, two that touch are none that it could rely on."""
        for at, n in self._registered.items():
            if at <= host and host + size <= at + n:
                return True
            _require(host + size <= at or at + n <= host)
        return False

    def cuStreamCreate(self, Flags):
        def call() -> Any:
            real.CUstream_flags(int(Flags))
            number = next(self._numbers)
            self._streams[number] = _Stream(self)
            return real.CUstream(number)

        return self._do("cuStreamCreate", call, in_context=True)

    def cuStreamDestroy(self, hStream):
        def call() -> Callable[[], None]:
            stream = self._streams.pop(int(hStream), None)
            if stream is None:
                raise Refused("CUDA_ERROR_INVALID_HANDLE")
            return stream.end

        return self._wait_for("cuStreamDestroy", call)

    def cuStreamSynchronize(self, hStream):
        def call() -> Callable[[], None]:
            mark = _Mark()
            self._stream(hStream).put(mark.passed.set)
            return lambda: self._await(mark)

        return self._wait_for("cuStreamSynchronize", call)

    def _stream(self, stream: Any) -> _Stream:
        found = self._streams.get(int(stream))
        if found is None:
            raise Refused("CUDA_ERROR_INVALID_HANDLE")
        return found

    def cuEventCreate(self, Flags):
        def call() -> Any:
            # Without these who waits spins, and each event costs time to record.
            _require(Flags == 3)
            number = next(self._numbers)
            self._events[number] = None
            return real.CUevent(number)

        return self._do("cuEventCreate", call, in_context=True)

    def cuEventDestroy(self, hEvent):
        def call() -> None:
            if self._events.pop(int(hEvent), self) is self:
                raise Refused("CUDA_ERROR_INVALID_HANDLE")

        return self._do("cuEventDestroy", call, in_context=True)

    def cuEventRecord(self, hEvent, hStream):
        def call() -> None:
            if int(hEvent) not in self._events:
                raise Refused("CUDA_ERROR_INVALID_HANDLE")
            mark = self._events[int(hEvent)] = _Mark()
            self._stream(hStream).put(mark.passed.set)

        return self._do("cuEventRecord", call, in_context=True)

    def cuEventSynchronize(self, hEvent):
        def call() -> Callable[[], None]:
            if int(hEvent) not in self._events:
                raise Refused("CUDA_ERROR_INVALID_HANDLE")
            mark = self._events[int(hEvent)]
            return lambda: self._await(mark)

        return self._wait_for("cuEventSynchronize", call)

    def _await(self, mark: _Mark | None) -> None:
        if mark is not None:
            mark.passed.wait()
        if self._lost is not None:
            raise Refused(self._lost)

    # -- copies ----------------------------------------------------------------------------------

    def cuMemcpyHtoDAsync(self, dstDevice, srcHost, ByteCount, hStream):
        def call() -> Any:
            return self._copy_in(int(dstDevice), srcHost, ByteCount, 1, ByteCount, hStream)

        return self._do("cuMemcpyHtoDAsync", call, in_context=True)

    def cuMemcpy2DAsync(self, pCopy, hStream):
        def call() -> Any:
            c, kinds = pCopy, real.CUmemorytype
            _require(c.srcMemoryType == kinds.CU_MEMORYTYPE_HOST)
            _require(c.dstMemoryType == kinds.CU_MEMORYTYPE_DEVICE)
            _require(c.srcPitch >= c.WidthInBytes and c.dstPitch == c.WidthInBytes)
            _require(not (c.srcXInBytes or c.srcY or c.dstXInBytes or c.dstY))
            where, rows = int(c.dstDevice), (c.WidthInBytes, c.Height, c.srcPitch)
            return self._copy_in(where, c.srcHost, *rows, hStream)

        return self._do("cuMemcpy2DAsync", call, in_context=True)

    def _copy_in(
        self, to: int, host: int, length: int, count: int, stride: int, stream: Any
    ) -> None:
        _require(length > 0 and count > 0)
        span = (count - 1) * stride + length
        self._check_reach(to, length * count)
        locked = self.is_locked(host, span)
        # What is not locked the driver takes at once, into memory of its own.
        kept = None if locked else ctypes.string_at(host, span)

        def land() -> None:
            if kept is None and not self.is_locked(host, span):
                raise Refused("CUDA_ERROR_ILLEGAL_ADDRESS")
            self._check_reach(to, length * count, _WRITE)
            data = ctypes.string_at(host, span) if kept is None else kept
            for row in range(count):
                part = data[row * stride : row * stride + length]
                ctypes.memmove(to + row * length, part, length)

        self._stream(stream).put(land)

    def cuMemcpyDtoHAsync(self, dstHost, srcDevice, ByteCount, hStream):
        def call() -> None:
            at = int(srcDevice)
            _require(ByteCount > 0)
            self._check_reach(at, ByteCount)
            locked = self.is_locked(dstHost, ByteCount)

            def land() -> None:
                if locked and not self.is_locked(dstHost, ByteCount):
                    raise Refused("CUDA_ERROR_ILLEGAL_ADDRESS")
                self._check_reach(at, ByteCount, _READ)
                ctypes.memmove(dstHost, at, ByteCount)

            self._stream(hStream).put(land)

        return self._do("cuMemcpyDtoHAsync", call, in_context=True)

    def cuMemcpyDtoDAsync(self, dstDevice, srcDevice, ByteCount, hStream):
        def call() -> None:
            to, at = int(dstDevice), int(srcDevice)
            _require(ByteCount > 0)
            self._check_reach(to, ByteCount)
            self._check_reach(at, ByteCount)

            def land() -> None:
                self._check_reach(at, ByteCount, _READ)
                self._check_reach(to, ByteCount)
                ctypes.memmove(to, at, ByteCount)

            self._stream(hStream).put(land)

        return self._do("cuMemcpyDtoDAsync", call, in_context=True)

    def cuMemsetD8Async(self, dstDevice, uc, N, hStream):
        def call() -> None:
            at = int(dstDevice)
            self._check_reach(at, N)

            def land() -> None:
                self._check_reach(at, N, _WRITE)
                ctypes.memset(at, uc, N)

            self._stream(hStream).put(land)

        return self._do("cuMemsetD8Async", call, in_context=True)

    def _check_reach(self, address: int, size: int, protection: int | None = None) -> None:
        """All of it mapped; and where a protection is given, it has at least that."""
        at = address
        while at < address + size:
            for base, mapping in self._mapped.items():
                if base <= at < base + mapping.size:
                    break
            else:
                _require(protection is not None)
                raise Refused("CUDA_ERROR_ILLEGAL_ADDRESS")
            if protection is not None and mapping.protection & protection != protection:
                raise Refused("CUDA_ERROR_ILLEGAL_ADDRESS")
            at = base + mapping.size

    def run_copy(self, land: Callable[[], None]) -> None:
        """A copy whose turn has come; from its stream's thread."""
        with self._lock:
            self.copied += 1
            if self._failing_copy is not None and self.copied == self._failing_copy[0]:
                self._lost = self._lost or self._failing_copy[1]
            if self._lost is None:
                try:
                    land()
                except Refused as error:
                    self._lost = str(error)

    # -- all of them -----------------------------------------------------------------------------

    def _do(
        self, name: str, call: Callable[[], Any], *, in_context: bool = False, before_init=False
    ) -> tuple[Any, ...]:
        if not self.library:
            raise RuntimeError("emulated: the driver's library was not found")
        if name in self.missing:
            raise RuntimeError(f'Function "{name}" not found')
        with self._lock:
            self.calls[name] += 1
            try:
                if not self._initialised and not before_init:
                    raise Refused("CUDA_ERROR_NOT_INITIALIZED")
                if self._lost is not None:
                    raise Refused(self._lost)
                nth, code = self._failures.get(name, (0, ""))
                if nth == self.calls[name]:
                    raise Refused(code)
                if in_context and getattr(self._current, "device", None) is None:
                    raise Refused("CUDA_ERROR_INVALID_CONTEXT")
                value = call()
            except Refused as error:
                if not hasattr(real.CUresult, str(error)):
                    raise ValueError(f"{error} is not a valid CUresult") from error
                # As many values as there are on success, all of them None.
                return getattr(real.CUresult, str(error)), *(
                    None for _ in range(_VALUES.get(name, 0))
                )
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        return real.CUresult.CUDA_SUCCESS, *values

    def _wait_for(self, name: str, call: Callable[[], Callable[[], None]]) -> tuple[Any, ...]:
        """A call that takes long, and does not keep others out meanwhile."""
        code, *values = self._do(name, call, in_context=True)
        if not values or values[0] is None:
            return (code,)
        try:
            values[0]()
        except Refused as error:
            code = getattr(real.CUresult, str(error))
        return (code,)


_VALUES = {
    **VALUES,
    "cuGetProcAddress": 2,
    "cuMemGetInfo": 2,
    **dict.fromkeys(
        (
            "cuDriverGetVersion",
            "cuDeviceGetCount",
            "cuDeviceGet",
            "cuDeviceGetName",
            "cuDeviceGetAttribute",
            "cuDevicePrimaryCtxRetain",
            "cuMemGetAllocationGranularity",
            "cuMemCreate",
            "cuMemExportToShareableHandle",
            "cuMemImportFromShareableHandle",
            "cuMemAddressReserve",
            "cuStreamCreate",
            "cuEventCreate",
        ),
        1,
    ),
}


class _Stream:
    """Work in order, done by a thread."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self.copies = 0
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="emulated-stream", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def end(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if getattr(work, "__name__", "") == "land":
                self._emulator.go.wait()
                if self._emulator.delay:
                    threading.Event().wait(self._emulator.delay)
                self._emulator.run_copy(work)
                self.copies += 1
            else:
                work()


def _is_open(inode: int) -> bool:
    return inode in descriptors()


def descriptors() -> list[int]:
    """The inode of each descriptor of emulated memory that this process has."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(f"/memfd:{MEMFD}-"):
                found.append(os.fstat(int(name)).st_ino)
        except OSError:  # closed meanwhile
            continue
    return found


def _mmap(
    address: int | None, size: int, protection: int, flags: int, fd: int = -1, offset: int = 0
) -> int | None:
    result = _libc.mmap(address, size, protection, flags, fd, offset)
    if result == ctypes.c_void_p(-1).value:
        return None
    if flags & _FIXED_NOREPLACE and result != address:
        _libc.munmap(result, size)
        return None
    return int(result)


def _mmap_aligned(size: int, alignment: int) -> int | None:
    """An address that is a multiple of the alignment, and of no more than that."""
    spare = 2 * max(alignment, mmap.PAGESIZE)
    found = _mmap(None, size + spare, _NONE, _EMPTY)
    if found is None:
        return None
    address = -(-found // alignment) * alignment
    if address % (2 * alignment) == 0:
        address += alignment
    before, after = address - found, found + spare - address
    for start, length in ((found, before), (address + size, after)):
        if length:
            _libc.munmap(start, length)
    return address
