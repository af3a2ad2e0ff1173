"""Memory of a replica: of all its processes together, each shared page counted once."""

from __future__ import annotations

import psutil

from coldframe.loader.errors import PlatformError

__all__ = ["replica_pss"]


def replica_pss(first: int, *others: int) -> int:
    """Proportional set size (PSS) of a process and of all below it, in bytes.

    A page that several processes map is divided among them, so that the sum over a replica counts
    it once: weights that two workers share, and weights that are mapped from the page cache.

    Args:
        first: The process that has started all the others: `coldframe serve`.
        others: Further ones that are below another process, such as forks of a template.

    Raises:
        PlatformError: The first one is gone, or the kernel does not tell (another user's).
    """
    try:
        root = psutil.Process(first)
        found = {process.pid: process for process in (root, *root.children(recursive=True))}
        root.memory_full_info()
    except psutil.NoSuchProcess as error:
        raise PlatformError("there is no such process", where=f"pid {first}") from error
    except psutil.AccessDenied as error:
        raise _denied(first) from error
    total = 0
    for pid in {*found, *others}:
        try:
            process = found.get(pid) or psutil.Process(pid)
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue  # it has ended meanwhile, and has none
        except psutil.AccessDenied as error:
            raise _denied(pid) from error
    return total


def _denied(pid: int) -> PlatformError:
    return PlatformError(
        "the memory of a process cannot be told",
        where=f"/proc/{pid}/smaps",
        hint="Run the benchmark as the user that the replica's processes belong to, or as root.",
    )
