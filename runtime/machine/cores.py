"""Cores of their own for prefill and decode, so that neither waits for the other's turn.

A worker reads which cores are its own in its environment: so the same is true for one that starts
fresh, for a clone and for a fork.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from coldframe.loader.errors import DeviceError

__all__ = ["CORES", "keep_to", "split_cores", "to_environment"]

CORES = "COLDFRAME_WORKER_CORES"
"""The environment variable that names a worker's cores: `0,1`."""
_TOPOLOGY = Path("/sys/devices/system/cpu")


def split_cores(
    cores: Iterable[int], topology: Path = _TOPOLOGY
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two halves of some logical cores, the first one for prefill, the second for decode.

    The threads of one physical core stay together as far as that goes, and so do the cores of a
    socket: halves that shared them would slow each other down after all.

    Args:
        cores: Those that there are.
        topology: Where the kernel says which of them belong together.

    Raises:
        DeviceError: There is only one.
    """
    ordered = sorted(cores, key=lambda core: (*_place(core, topology), core))
    if len(ordered) < 2:
        raise DeviceError(
            "there are not cores enough for workers that have some of their own",
            where="--pin",
            expected="at least 2",
            got=len(ordered),
            hint="Leave --pin out, or give the container more.",
        )
    places = [_place(core, topology) for core in ordered]
    half = len(ordered) // 2
    # The cut between two physical cores that is nearest to the middle, where there is one.
    cuts = [i for i in range(1, len(ordered)) if places[i] != places[i - 1]] or [half]
    cut = min(cuts, key=lambda i: abs(i - half))
    return tuple(ordered[:cut]), tuple(ordered[cut:])


def to_environment(cores: Iterable[int]) -> str:
    """What a worker's environment says of its cores; of none, that it has none of its own."""
    return ",".join(map(str, cores))


def keep_to(cores: str | None) -> None:
    """Has this process run on the cores that its environment names, and nowhere else.

    To be called before there are threads that compute: they inherit it.

    Args:
        cores: The value of `CORES`; None and an empty one change nothing.

    Raises:
        DeviceError: The kernel does not let it.
    """
    if not cores:
        return
    try:
        wanted = {int(core) for core in cores.split(",")}
        for thread in threading.enumerate():
            # By its id as the thread itself knows it: /proc may be that of another namespace.
            os.sched_setaffinity(thread.native_id or 0, wanted)
    except (OSError, ValueError) as error:
        raise DeviceError(
            "a worker cannot keep to its cores", where=CORES, expected=cores, got=str(error)
        ) from error


def _place(core: int, topology: Path) -> tuple[int, int]:
    """The socket, and the physical core in it."""
    folder = topology / f"cpu{core}" / "topology"
    try:
        package = int((folder / "physical_package_id").read_text())
        return package, int((folder / "core_id").read_text())
    except (OSError, ValueError):  # not everywhere is there a /sys
        return 0, core
