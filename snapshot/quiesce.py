"""Bringing a process to rest before it is frozen, and proof that it is.

What CRIU could not dump, what would be the same in all clones, and what would make the image
large or leak into it has to be gone. Each thing that is not is refused by its name, while the
process can still say so.

A process on a GPU has threads, descriptors and mappings that are the driver's. What of them a
checkpoint of its context does not take away is memory, threads and pipes, as CRIU can write them;
so they are left to that, and what is ours has to be gone there too.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import stat
import sys
import threading
import time

from coldframe.loader.errors import SnapshotError
from coldframe.snapshot.entropy import forget_kernel_randomness

__all__ = ["check_quiet", "quiesce"]

_OMP_PAUSE_HARD = 2
_NULL_DEVICE = os.makedev(1, 3)
_OPENMP = ("libgomp", "libomp", "libiomp")
_THREADS_END_S = 1.0
_DRIVERS = re.compile(
    r"/dev/nvidia.*|/dev/shm/cuda\..*|anon_inode:\[event(fd|poll)\]|(pipe|socket):\[\d+\]"
)
"""Descriptors that a driver may have open."""
_DRIVERS_MAPPING = re.compile(
    r"/dev/nvidia.*|/dev/shm/cuda\..*|/dev/zero \(deleted\)|anon_inode:.*"
)
"""Mappings likewise; the third is memory that it shares with whom it may fork."""


def quiesce(control_fd: int, *, on_gpu: bool = False) -> None:
    """Brings this process to rest.

    Args:
        control_fd: The one socket that may stay open.
        on_gpu: Whether it has a context on a GPU, which is checkpointed behind this.

    Raises:
        SnapshotError: Something stays that may not be frozen; it says what.
    """
    os.chdir("/")
    _check_waiting()
    _pause_openmp()
    _await_one_thread(on_gpu)
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    sys.stderr.flush()
    libc.fflush(None)  # else each clone would write what is left there
    gc.collect()
    gc.collect()  # finalisers of the first round leave garbage too
    gc.freeze()
    libc.malloc_trim(0)
    forget_kernel_randomness()
    check_quiet(control_fd, on_gpu=on_gpu)


def check_quiet(control_fd: int, *, on_gpu: bool = False) -> None:
    """Looks whether this process may be frozen; see `quiesce`.

    Raises:
        SnapshotError: It may not; it says why.
    """
    _check_threads(on_gpu)
    _check_children()
    _check_descriptors(control_fd, on_gpu)
    _check_mappings(on_gpu)


def _pause_openmp() -> None:
    """Ends the thread pools of every OpenMP in this process; they come back when used.

    A pool does not survive a fork or a freeze: its threads are gone, and the next parallel region
    would wait for them for ever.
    """
    for path in _openmp_libraries():
        library = ctypes.CDLL(path)
        if not hasattr(library, "omp_pause_resource_all"):
            raise _refusal("an OpenMP library cannot end its threads", path, "OpenMP 5.0", "older")
        result = library.omp_pause_resource_all(_OMP_PAUSE_HARD)
        if result != 0:
            raise _refusal("an OpenMP library did not end its threads", path, 0, result)


def _check_waiting() -> None:
    """Threads that wait must sleep, and how they wait is decided when OpenMP is loaded."""
    with open("/proc/self/environ", "rb") as file:
        passive = b"OMP_WAIT_POLICY=PASSIVE" in file.read().upper().split(b"\0")
    libraries = _openmp_libraries()
    if libraries and not passive:
        raise _refusal(
            "OpenMP's threads would spin while they wait, in every clone",
            libraries[0],
            "a process started with OMP_WAIT_POLICY=PASSIVE",
            "another or no wait policy",
        )


def _openmp_libraries() -> list[str]:
    paths = {path for _, path in _mappings() if os.path.basename(path).startswith(_OPENMP)}
    return sorted(paths)


def _await_one_thread(on_gpu: bool) -> None:
    """Threads that were told to end do so a moment later."""
    deadline = time.monotonic() + _THREADS_END_S
    while _other_threads(on_gpu) and time.monotonic() < deadline:
        time.sleep(0.001)


def _other_threads(on_gpu: bool) -> list[str]:
    """The names of all threads but the main one; on a GPU those of Python's, which are ours."""
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    main = os.readlink("/proc/self")  # whatever /proc is mounted, this is our name in it
    others = [thread for thread in os.listdir("/proc/self/task") if thread != main]
    if on_gpu:
        return [names[thread] for thread in others if thread in names]
    return [names.get(thread) or _comm(thread) for thread in others]


def _check_threads(on_gpu: bool) -> None:
    others = _other_threads(on_gpu)
    if not others:
        return
    raise _refusal(
        "other threads still run",
        "/proc/self/task",
        "the main thread alone",
        ", ".join(sorted(others)),
        "What starts threads when it is imported has a switch, such as OPENBLAS_NUM_THREADS=1.",
    )


def _comm(thread: str) -> str:
    try:
        with open(f"/proc/self/task/{thread}/comm") as file:
            return f"{file.read().strip()} (not Python's)"
    except OSError:
        return f"thread {thread}, just ended"


def _check_children() -> None:
    try:
        with open("/proc/thread-self/children") as file:
            children = file.read().split()
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return
    if children:
        raise _refusal("it has child processes", "process", "none", ", ".join(children))


def _check_descriptors(control_fd: int, on_gpu: bool) -> None:
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        try:
            found, target = os.fstat(fd), os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # that of the listing itself
            continue
        if fd == control_fd or (on_gpu and fd > 2 and _DRIVERS.fullmatch(target)):
            continue
        where = f"descriptor {fd}"
        if fd > 2:
            raise _refusal("a descriptor is still open", where, "closed", target)
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != _NULL_DEVICE:
            raise _refusal("a standard stream leads somewhere", where, "/dev/null", target)


def _check_mappings(on_gpu: bool) -> None:
    """Shared memory would be dumped with what is in it, and deleted files are not there later."""
    for kind, path in _mappings():
        if on_gpu and _DRIVERS_MAPPING.fullmatch(path):
            continue
        shared = "s" in kind and ("w" in kind or not path.startswith("/"))
        of_memory = path.startswith(("/memfd:", "/dev/shm/", "/SYSV", "anon_inode:", "/dev/zero"))
        gone = path.endswith(" (deleted)")
        if shared or of_memory or gone:
            raise _refusal(
                "something is still mapped that cannot be in an image",
                path or "anonymous shared memory",
                "private memory and library files",
                f"{kind}, {'a deleted file' if gone and not shared else 'shared memory'}",
            )


def _mappings() -> list[tuple[str, str]]:
    """Access (such as `rw-s`) and path of each mapping."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            fields = line.rstrip("\n").split(maxsplit=5)
            found.append((fields[1], fields[5] if len(fields) > 5 else ""))
    return found


def _refusal(
    what: str, where: object, expected: object, got: object, hint: str | None = None
) -> SnapshotError:
    return SnapshotError(
        f"the worker cannot be frozen: {what}",
        where=where,
        expected=expected,
        got=got,
        hint=hint or "Workers start fresh until this is mended.",
    )
