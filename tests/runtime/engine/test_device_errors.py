"""What torch says of a GPU that fails, in the words of its own sources, and what is made of it."""

from __future__ import annotations

import pytest
import torch
from cuda.bindings.driver import CUresult

from coldframe.loader.devices.driver_errors import kind_of
from coldframe.loader.errors import DeviceError, DeviceFull, DeviceLost
from coldframe.runtime.engine.device_errors import as_device_error

ILLEGAL = (
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in "
    "https://docs.nvidia.com/cuda/ for more information.\nCUDA kernel errors might be "
    "asynchronously reported at some other API call, so the stacktrace below might be incorrect."
)
BLAS = "CUDA error: {} when calling `cublasGemmEx( handle, opa, opb, m, n, k, alpha_ptr, ...)`"


def accelerator_error(text: str, code: int | None) -> Exception:
    """As torch makes it: the runtime's code is an attribute."""
    error = torch.AcceleratorError(text)
    if code is not None:
        error.error_code = code
    return error


@pytest.mark.parametrize(
    ("error", "kind", "name"),
    [
        (accelerator_error(ILLEGAL, 700), DeviceLost, "CUDA_ERROR_ILLEGAL_ADDRESS"),
        (accelerator_error("CUDA error: x", 214), DeviceLost, "CUDA_ERROR_ECC_UNCORRECTABLE"),
        (accelerator_error("CUDA error: out of memory", 2), DeviceFull, "CUDA_ERROR_OUT_OF_MEMORY"),
        (accelerator_error("CUDA error: invalid argument", 1), DeviceError, "INVALID_VALUE"),
        (accelerator_error(ILLEGAL, 98), DeviceError, "cudaErrorIllegalAddress"),  # no driver's
        (accelerator_error(ILLEGAL, None), DeviceError, "cudaErrorIllegalAddress"),
        (accelerator_error("CUDA error: of the future", 98765), DeviceError, "of the future"),
        (accelerator_error("", None), DeviceError, ""),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
            DeviceFull,
            "CUDA_ERROR_OUT_OF_MEMORY",
        ),
        (RuntimeError(BLAS.format("CUBLAS_STATUS_ALLOC_FAILED")), DeviceFull, "ALLOC_FAILED"),
        (RuntimeError(BLAS.format("CUBLAS_STATUS_EXECUTION_FAILED")), DeviceLost, "EXECUTION_FAIL"),
        (RuntimeError(BLAS.format("CUBLAS_STATUS_INVALID_VALUE")), DeviceError, "INVALID_VALUE"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), DeviceLost, "CUDNN_STATUS_INT"),
        (RuntimeError("CUDA driver error: out of memory"), DeviceFull, "CUDA_ERROR_OUT_OF_MEMORY"),
        (RuntimeError("CUDA driver error: CUDA_ERROR_UNKNOWN"), DeviceLost, "CUDA_ERROR_UNKNOWN"),
    ],
)
def test_each_is_an_error_of_ours(error: Exception, kind: type[DeviceError], name: str) -> None:
    found = as_device_error(error, "decode")
    assert found is not None
    assert type(found) is kind
    assert name in (found.got or "")
    assert "\n" not in str(found)
    assert found.where == "decode"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate"),
        ValueError("CUDA error: said by nobody"),
        MemoryError(),
        KeyError("blocks"),
    ],
)
def test_others_are_not(error: Exception) -> None:
    assert as_device_error(error, "decode") is None


def test_each_number_of_the_driver_has_its_kind() -> None:
    """The runtime, whose codes torch gives on, has the driver's numbers."""
    for code in CUresult:
        found = as_device_error(accelerator_error("CUDA error: x", int(code)), "prefill")
        assert found is not None
        assert type(found) is kind_of(code.name)[0]
        assert (found.got or "").startswith(code.name)
