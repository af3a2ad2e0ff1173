"""What torch raises when a GPU fails, as errors of ours, with the driver's own name for the code.

Torch speaks of such failures in three ways: an error with a code, whose number is the driver's; one
of its own where there is no memory; a sentence with the name of a library's status in it. Whatever
is none of these is no GPU's doing.
"""

from __future__ import annotations

import importlib
import re

import torch

from coldframe.loader.devices.driver_errors import kind_of
from coldframe.loader.errors import DeviceError, DeviceLost

__all__ = ["as_device_error"]

_FULL = "CUDA_ERROR_OUT_OF_MEMORY"
_OF_A_GPU = re.compile(r"CUDA (?:driver )?error:|cuDNN error:")
_STATUS = re.compile(r"\b(?:CUBLAS|CUDNN)_STATUS_(\w+)")
_NAMES = (re.compile(r"\bCUDA_ERROR_\w+"), _STATUS, re.compile(r"\bcudaError[A-Z]\w+"))
_BROKEN = ("EXECUTION_FAILED", "INTERNAL_ERROR", "MAPPING_ERROR")
"""What a library says of a kernel that did not run to its end."""


def as_device_error(error: BaseException, where: str) -> DeviceError | None:
    """The error of ours for what torch raised; None where it is not about a GPU.

    Args:
        error: What was raised.
        where: By whom, for the message.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        name = _FULL
    elif isinstance(error, torch.AcceleratorError):
        name = _name_of(getattr(error, "error_code", None)) or _name_in(text)
    elif isinstance(error, RuntimeError) and (_OF_A_GPU.search(text) or _STATUS.search(text)):
        name = _name_in(text)
    else:
        return None
    kind, hint = _kind_of(name)
    first = text.partition("\n")[0]
    got = name if name in first or not first else f"{name} ({first})"
    return kind("the GPU failed while the engine used it", where=where, got=got, hint=hint)


def _name_of(code: int | None) -> str | None:
    """What the driver calls a code, if anybody here knows."""
    try:
        # What a worker has imported already to attach its arenas.
        return str(importlib.import_module("cuda.bindings.driver").CUresult(code).name)
    except (ImportError, AttributeError, ValueError):  # no bindings, or none that know the number
        return None


def _name_in(text: str) -> str:
    for pattern in _NAMES:
        found = pattern.search(text)
        if found is not None:
            return found.group()
    return _FULL if "out of memory" in text else text.partition("\n")[0]


def _kind_of(name: str) -> tuple[type[DeviceError], str | None]:
    status = _STATUS.fullmatch(name)
    if status is None:
        return kind_of(name)
    if status.group(1) == "ALLOC_FAILED":
        return kind_of(_FULL)
    if status.group(1) in _BROKEN:
        return DeviceLost, None
    return DeviceError, "See what the library's documentation says of it."
