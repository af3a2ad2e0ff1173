"""Which GPU takes the place of which when a context comes back, and which there are to be named.

A driver wants all that the kernel's part of it has, also those that are hidden from the process
which asks it. A context fits GPUs of the same kind only, and there must be as many of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from coldframe.loader.errors import AnotherDevice

__all__ = ["KERNEL_GPUS", "gpu_pairs", "hidden_gpus"]

KERNEL_GPUS = "/proc/driver/nvidia/gpus"
"""Where the kernel's part of the driver lists them."""


def gpu_pairs(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str] | None:
    """Which GPU takes the place of which.

    Args:
        old: What the GPUs were called, by UUID; the one that was computed on first.
        new: Likewise, those that are here.

    Returns:
        The new UUID for each old one; None where each GPU is where it was.

    Raises:
        AnotherDevice: There are more, fewer or others.
    """
    here, there = list(new.values()), list(old.values())
    if sorted(here) != sorted(there) or here[:1] != there[:1]:
        raise AnotherDevice(
            "a context was frozen on another GPU",
            expected=", ".join(f"{name} ({uuid})" for uuid, name in old.items()),
            got=", ".join(f"{name} ({uuid})" for uuid, name in new.items()),
        )
    if not old:
        return None
    # The process goes on where its weights are, whichever GPU that is now.
    pairs = {next(iter(old)): next(iter(new))}
    left = [uuid for uuid in new if uuid not in pairs.values()]
    waiting = [uuid for uuid in old if uuid not in pairs]
    # Of the others, those that are still here stay what they are.
    for uuid in [uuid for uuid in waiting if uuid in left]:
        pairs[uuid] = uuid
        left.remove(uuid)
        waiting.remove(uuid)
    for uuid in waiting:
        pairs[uuid] = next(other for other in left if new[other] == old[uuid])
        left.remove(pairs[uuid])
    return None if all(one == other for one, other in pairs.items()) else pairs


def hidden_gpus(folder: str = KERNEL_GPUS) -> dict[str, str]:
    """What each GPU is called that the kernel's driver has, by UUID; none where it does not say.

    Args:
        folder: Where it lists them.
    """
    found = {}
    for path in sorted(Path(folder).glob("*/information")):
        with suppress(OSError):
            lines = (line.partition(":") for line in path.read_text().splitlines())
            told = {key.strip(): value.strip() for key, _, value in lines}
            if told.get("GPU UUID", "").startswith("GPU-"):
                found[told["GPU UUID"]] = told.get("Model", "")
    return found
