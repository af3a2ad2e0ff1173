"""Compiled code in a process that is to be frozen: loaded as a library, kept as plain memory.

A process image maps libraries again by their path, and there is no path that would be the same on
the next machine. So the code is loaded from memory of this process's own, and what the dynamic
linker has mapped is then put in private memory that no file stands behind: it is in the image like
everything else that the process has, its hash included, and clones have it when they wake up.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import tempfile

import torch

from coldframe.loader.errors import SnapshotError
from coldframe.runtime.compiled.folder import CodeFolder
from coldframe.runtime.engine.compiled import Code, Runner, Sized
from coldframe.runtime.units import first_line

__all__ = ["load_code", "load_library"]

_NAME = "coldframe-code"
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (....) \S+ \S+ \S+ +/memfd:" + _NAME)
_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_FAILED = ctypes.c_void_p(-1).value


def load_code(folder: CodeFolder) -> Code:
    """Loads what a folder has.

    Raises:
        SnapshotError: It is damaged, or cannot be loaded here.
    """
    sizes = [
        Sized(
            size.sequences,
            load_library(folder.bytes_of(size.layer)),
            load_library(folder.bytes_of(size.logits)),
            size.keys,
        )
        for size in folder.sizes
    ]
    return Code(folder.shape, tuple(sizes), folder.note)


def load_library(content: bytes) -> Runner:
    """A compiled function that no file stands behind.

    By the runner itself: `aoti_load_package` has a C++ compiler try something first.

    Raises:
        SnapshotError: The dynamic linker or torch does not take it.
    """
    fd = os.memfd_create(_NAME)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(content)
        # The linker knows libraries by their names, and a descriptor's number is soon another's.
        with tempfile.TemporaryDirectory(prefix="coldframe-") as folder:
            path = os.path.join(folder, "code.so")
            os.symlink(f"/proc/self/fd/{fd}", path)
            runner: Runner = torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1)
        _let_go_of_file()
    except (RuntimeError, OSError) as error:
        raise SnapshotError(
            "compiled code cannot be loaded",
            got=first_line(error),
            hint="Steps are computed eagerly.",
        ) from error
    finally:
        os.close(fd)
    return runner


def _let_go_of_file() -> None:
    """Puts what is mapped of such a file into memory of the same content at the same place.

    Raises:
        OSError: The kernel does not do that.
    """
    with open("/proc/self/maps") as file:
        found = [match for line in file if (match := _LINE.match(line))]
    for match in found:
        start, end = int(match[1], 16), int(match[2], 16)
        _replace(start, end - start, _protection(match[3]))


def _protection(access: str) -> int:
    bits = ((mmap.PROT_READ, "r"), (mmap.PROT_WRITE, "w"), (mmap.PROT_EXEC, "x"))
    return sum(bit for bit, letter in bits if letter in access)


def _replace(start: int, nbytes: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    size, number = ctypes.c_size_t(nbytes), ctypes.c_int
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    new = libc.mmap(
        *(None, size, number(writable), number(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)),
        *(number(-1), ctypes.c_long(0)),
    )
    if new == _FAILED:
        raise _os_error()
    if protection & mmap.PROT_READ:
        ctypes.memmove(new, start, nbytes)
    place = ctypes.c_void_p(new)
    # In one step for whoever runs there.
    if (
        libc.mprotect(place, size, number(protection))
        or libc.mremap(
            *(place, size, size, number(_MREMAP_MAYMOVE | _MREMAP_FIXED)), ctypes.c_void_p(start)
        )
        == _FAILED
    ):
        error = _os_error()
        libc.munmap(place, size)
        raise error


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
