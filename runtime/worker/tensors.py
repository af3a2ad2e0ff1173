"""Memory that somebody else has mapped as torch tensors: by address, nothing copied or read.

A tensor is made of an address through DLPack, on every device in the same way. Of the ways to hand
torch an address on a GPU it is the one that asks the driver nothing: KV is reserved in full while
only its first part is mapped, and the driver knows nothing of an address without memory behind it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from coldframe.loader.checkpoints.plan import Plan
from coldframe.loader.errors import DeviceError, NoDevice

# Torch is on its way while this is imported.
if TYPE_CHECKING:
    import torch

__all__ = ["Memory", "tensor_over", "tensors_of", "torch_dtypes"]

_CPU, _CUDA = 1, 2  # kDLCPU and kDLCUDA
_UNSIGNED = 1  # kDLUInt
_NAME = b"dltensor"
"""What a capsule is called until somebody takes it; the name must outlive the capsule."""
_TAKEN = b"used_dltensor"


class Memory(Protocol):
    """A range of addresses, such as a reservation of the loader's."""

    @property
    def address(self) -> int: ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """DLPack's kind of device, and which one of its kind."""
        ...


def torch_dtypes() -> dict[str, torch.dtype]:
    """Torch's dtypes by their safetensors names: those that the engine computes in."""
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def tensors_of(plan: Plan, memory: Memory) -> dict[str, torch.Tensor]:
    """The planned tensors by name, as views of an arena.

    Args:
        plan: Where they lie.
        memory: The arena, which must stay mapped as long as a tensor is used.

    Raises:
        NoDevice: See `tensor_over`.
    """
    flat = tensor_over(memory.address, plan.arena_bytes, memory.dlpack_device)
    dtypes = torch_dtypes()
    return {
        p.name: flat[p.arena_offset : p.arena_offset + p.nbytes].view(dtypes[p.dtype]).view(p.shape)
        for p in plan.placements.values()
        if p.dtype in dtypes
    }


def tensor_over(address: int, nbytes: int, device: tuple[int, int]) -> torch.Tensor:
    """A tensor of bytes over memory that somebody else has mapped, or is going to.

    Nothing is read. The memory is nobody's to free: it must stay mapped as long as the tensor, or
    a view of it, is used. What is mapped for reading only must not be written to.

    Args:
        address: Of the first byte, as the device has it.
        nbytes: How many.
        device: As DLPack says it: (1, 0) is the CPU, (2, N) the GPU cuda:N.

    Returns:
        `[nbytes]`, uint8.

    Raises:
        NoDevice: This torch cannot compute there.
        DeviceError: Torch does not take the memory.
    """
    import torch
    from torch.utils.dlpack import from_dlpack

    if device[0] == _CUDA and not torch.cuda.is_available():
        raise NoDevice(
            "torch cannot use the GPU",
            where=f"cuda:{device[1]}",
            expected="a torch that was built with CUDA, and a driver that it works with",
            got=f"torch {torch.__version__}",
        )
    capsule = _capsule(address, nbytes, device)
    try:
        tensor: torch.Tensor = from_dlpack(capsule)
    except (BufferError, RuntimeError) as error:
        raise DeviceError(
            "torch does not take memory of this device",
            where=f"{nbytes:,} bytes at {address:#x}",
            expected="a CPU or a GPU that torch knows",
            got=str(error).splitlines()[0],
        ) from error
    finally:
        _free_untaken(capsule)
    return tensor


# -- DLPack's structures (dlpack.h, version 0.8), and a capsule around them -----------------------


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        # What is behind DLPack's own fields is ours: the numbers that `shape` and `strides` show.
        ("shape", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


def _capsule(address: int, nbytes: int, device: tuple[int, int]) -> Any:
    """A capsule that torch takes, and renames.

    What describes the tensor lives in one piece from malloc, and the deleter is free itself: torch
    calls it when the last view is gone, from whatever thread that is, in the interpreter's last
    moments too, when nothing of Python could be called any more. The memory that the tensor shows
    is left alone.
    """
    place = _libc().malloc(ctypes.sizeof(_Managed))
    if not place:
        raise MemoryError
    managed = _Managed.from_address(place)
    managed.tensor = _Tensor(
        data=address,
        device_type=device[0],
        device_id=device[1],
        ndim=1,
        code=_UNSIGNED,
        bits=8,
        lanes=1,
        shape=place + _Managed.shape.offset,
        strides=place + _Managed.stride.offset,
        byte_offset=0,
    )
    managed.manager = None
    managed.deleter = ctypes.cast(_libc().free, ctypes.c_void_p)
    managed.shape, managed.stride = nbytes, 1
    return _python().PyCapsule_New(place, _NAME, None)


def _free_untaken(capsule: Any) -> None:
    """Gives back what torch did not take: that still has its first name."""
    python = _python()
    if python.PyCapsule_IsValid(capsule, _NAME):
        _libc().free(python.PyCapsule_GetPointer(capsule, _NAME))
        python.PyCapsule_SetName(capsule, _TAKEN)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.free.restype = None
    libc.free.argtypes = (ctypes.c_void_p,)
    return libc


@cache
def _python() -> ctypes.PyDLL:
    python = ctypes.PyDLL(None)  # a handle of its own: what is declared here is nobody else's
    python.PyCapsule_New.restype = ctypes.py_object
    python.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    python.PyCapsule_IsValid.restype = ctypes.c_int
    python.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    python.PyCapsule_SetName.restype = ctypes.c_int
    python.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
    return python
