"""Memory of a replica: of all its processes together, each shared page counted once."""

from __future__ import annotations

from pathlib import Path

import psutil

from coldframe.loader.errors import PlatformError

__all__ = ["process_memory", "replica_pss"]


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
        children = psutil.Process(first).children(recursive=True)
        total = _bytes(first, "smaps_rollup")["Pss"]
    except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError) as error:
        raise PlatformError("there is no such process", where=f"pid {first}") from error
    except PermissionError as error:
        raise _denied(first) from error
    for pid in {*(child.pid for child in children), *others} - {first}:
        try:
            total += _bytes(pid, "smaps_rollup")["Pss"]
        except (ProcessLookupError, FileNotFoundError):
            continue  # it has ended meanwhile, and has none
        except PermissionError as error:
            raise _denied(pid) from error
    return total


def process_memory(pid: int) -> dict[str, int]:
    """Memory of one process in bytes: `pss`, `rss` and `peak_rss`.

    Raises:
        PlatformError: It is gone, or the kernel does not tell.
    """
    try:
        told = _bytes(pid, "smaps_rollup") | _bytes(pid, "status")
    except (ProcessLookupError, FileNotFoundError) as error:
        raise PlatformError("there is no such process", where=f"pid {pid}") from error
    except PermissionError as error:
        raise _denied(pid) from error
    return {"pss": told["Pss"], "rss": told["Rss"], "peak_rss": told["VmHWM"]}


def _bytes(pid: int, file: str) -> dict[str, int]:
    """What a file of /proc says of a process's memory, by name.

    Raises:
        ProcessLookupError: It has ended.
        FileNotFoundError: It has been reaped, too.
        PermissionError: It is another user's.
    """
    found = {}
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        if unit == "kB":
            found[name] = int(number) << 10
    return found


def _denied(pid: int) -> PlatformError:
    return PlatformError(
        "the memory of a process cannot be told",
        where=f"/proc/{pid}/smaps",
        hint="Run the benchmark as the user that the replica's processes belong to, or as root.",
    )
