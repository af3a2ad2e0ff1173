"""Register state that a process must ask the kernel for, before it may use it: AMX's tiles.

The permission is the process's own, and CRIU does not bring it back. Libraries ask once, when they
look which instructions there are; a clone that goes on behind that would be killed by its first
matrix product. So it asks again, for all that the frozen process had.
"""

from __future__ import annotations

import ctypes
import os

from coldframe.loader.errors import SnapshotError

__all__ = ["ask_for", "granted"]

_ARCH_PRCTL = 158  # on x86-64, which alone has this
_GET_GRANTED, _ASK = 0x1022, 0x1023


def granted() -> int:
    """The features that this process may use, as a mask of their numbers; 0 where none has to ask.

    What every process has is among them.
    """
    if os.uname().machine != "x86_64":
        return 0
    return _read(_GET_GRANTED)


def ask_for(features: int) -> None:
    """Asks for features that this process may not use yet.

    Args:
        features: What `granted` has said.

    Raises:
        SnapshotError: The kernel refuses one.
    """
    missing = features & ~granted()
    for feature in (number for number in range(64) if missing >> number & 1):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(_ARCH_PRCTL, _ASK, ctypes.c_ulong(feature)) != 0:
            raise SnapshotError(
                "the kernel does not let a clone use registers that its image uses",
                where=f"arch_prctl, feature {feature}",
                expected="granted",
                got=os.strerror(ctypes.get_errno()),
                hint="The worker starts fresh instead.",
            )


def _read(which: int) -> int:
    found = ctypes.c_uint64()
    libc = ctypes.CDLL(None, use_errno=True)
    # A kernel before 5.16 knows nothing of it.
    failed = libc.syscall(_ARCH_PRCTL, which, ctypes.byref(found)) != 0
    return 0 if failed else found.value
