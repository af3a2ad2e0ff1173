"""What the driver's errors mean to us: which kind of error each is, and what to do about it."""

from __future__ import annotations

from coldframe.loader.errors import DeviceError, DeviceFull, DeviceLost, NoDevice

__all__ = ["NO_GPU", "code_of", "kind_of"]

NO_GPU = "Give the container a GPU (--gpus, a device plugin), or take the CPU."

_BROKEN = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ASSERT",
        "CONTAINED",
        "CONTEXT_IS_DESTROYED",
        "DEINITIALIZED",
        "DEVICE_UNAVAILABLE",
        "ECC_UNCORRECTABLE",
        "EXTERNAL_DEVICE",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_ADDRESS",
        "ILLEGAL_INSTRUCTION",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
        "LAUNCH_TIMEOUT",
        "MISALIGNED_ADDRESS",
        "MPS_CLIENT_TERMINATED",
        "NVLINK_UNCORRECTABLE",
        "TENSOR_MEMORY_LEAK",
        "UNKNOWN",
    )
)
"""After one of these each further call fails, whatever it asks for."""

_ABSENT = {
    "NO_DEVICE": NO_GPU,
    "INVALID_DEVICE": "Name a GPU that this process can see (CUDA_VISIBLE_DEVICES, nvidia-smi).",
    "STUB_LIBRARY": "Take the toolkit's stub of libcuda out of the library path.",
    "SYSTEM_DRIVER_MISMATCH": "Mount the libcuda of the kernel's driver, or reboot.",
    "COMPAT_NOT_SUPPORTED_ON_DEVICE": "Take the forward-compatibility libcuda out of the path.",
    "SYSTEM_NOT_READY": "Start what the machine's GPUs need first (nvidia-fabricmanager).",
    "DEVICE_NOT_LICENSED": "Get the virtual GPU a licence.",
}

_HINTS = {
    "INVALID_VALUE": "This is a mistake in coldframe or in what it was given: report it.",
    "INVALID_HANDLE": "It was released already, which is a mistake in coldframe: report it.",
    "INVALID_CONTEXT": "No context is current in this thread, which is a mistake: report it.",
    "NOT_PERMITTED": "The container may not do that; run it with the GPU's device files.",
    "NOT_SUPPORTED": "This GPU or its driver cannot do that (MIG, WSL, an old driver).",
    "NOT_READY": "A process did not come to rest in time; try again.",
    "ILLEGAL_STATE": "The process is not in the state that this starts from.",
    "PEER_ACCESS_UNSUPPORTED": "These two GPUs cannot reach each other's memory: use one of them.",
    "PEER_ACCESS_NOT_ENABLED": "Let the one GPU reach the other's memory first.",
    "TOO_MANY_PEERS": "A GPU reaches the memory of a few others only: use fewer.",
    "MPS_MAX_CLIENTS_REACHED": "Stop another process that uses this GPU over MPS.",
    "OPERATING_SYSTEM": "The kernel refused; raise the limits on locked memory and open files.",
}


def kind_of(name: str) -> tuple[type[DeviceError], str | None]:
    """The error for one of the driver's.

    Args:
        name: What the driver calls it, such as `CUDA_ERROR_OUT_OF_MEMORY`.

    Returns:
        The kind, and a hint; None where the kind's own says it.
    """
    short = name.removeprefix("CUDA_ERROR_")
    if short == "OUT_OF_MEMORY":
        return DeviceFull, "Free memory of the GPU (nvidia-smi) or take a smaller model."
    if name in _BROKEN:
        return DeviceLost, None
    if short in _ABSENT:
        return NoDevice, _ABSENT[short]
    return DeviceError, _HINTS.get(short, "See what the driver's documentation says of it.")


def code_of(error: DeviceError) -> str:
    """The driver's own name for what an error of its is about; empty where there is none."""
    name = (error.got or "").split(" ")[0]
    return name if name.startswith("CUDA_ERROR_") else ""
