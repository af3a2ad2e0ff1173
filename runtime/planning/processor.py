"""Processor time of a replica's processes, and the page cache of what they read.

Where processors are few, what a stream takes of them is missing elsewhere: so both are looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from coldframe.loader.cgroup import cpu_count
from coldframe.runtime.planning.footprint import forks_of, tree

__all__ = ["busy_processors", "drop_files", "idle_s", "load_files", "processor_s"]

_FIRST = 13
"""Of the words of `/proc/PID/stat`, counted from 0: utime, stime, and those of ended children."""
_BUFFER = 8 << 20


def processor_s(pid: int, template: int | None = None) -> float:
    """What a process, all below it and those of them that have ended have run, in seconds.

    What ends meanwhile counts for nothing.

    Args:
        pid: The front of a replica.
        template: As for `footprint`.
    """
    return sum(map(_ticks, (*tree(pid), *forks_of(template)))) / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            said = file.read()
    except OSError:
        return 0
    # Behind the name, in which there may be anything.
    words = said.rpartition(b")")[2].split()
    start = _FIRST - 2
    return sum(map(int, words[start : start + 4]))


def idle_s() -> float:
    """For how long processors of this machine have had nothing to do, all of them added up.

    Where the kernel does not say so, they have had none such time.
    """
    try:
        with open("/proc/stat", encoding="ascii") as file:
            idle, waiting = map(int, file.readline().split()[4:6])
    except (OSError, ValueError):
        return 0.0
    return (idle + waiting) / os.sysconf("SC_CLK_TCK")


def busy_processors(
    pid: int, seconds: float, idle_before_s: float, template: int | None = None
) -> float:
    """How many processors were busy since a process began, or were others', in the mean.

    Args:
        pid: The process; it counts with all below it.
        seconds: How long ago that was.
        idle_before_s: What `idle_s` was then.
        template: As for `footprint`.
    """
    own = processor_s(pid, template) / seconds
    # What others had was not to be had; where a container may use but some, the rest are not, too.
    return max(own, cpu_count() - (idle_s() - idle_before_s) / seconds)


def load_files(files: Iterable[str]) -> None:
    """Has the page cache have them."""
    buffer = bytearray(_BUFFER)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_files(files: Iterable[str]) -> None:
    """Has the page cache forget them, where they lie on a disk and nobody has them mapped."""
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
